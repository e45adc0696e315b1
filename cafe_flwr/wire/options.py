"""Settings of what travels: bounds on norms, and differential privacy."""

from __future__ import annotations

from dataclasses import dataclass

from cafe_flwr.core.options import check_settings, option, section


@section("federation")
@dataclass(frozen=True)
class Bounds:
    """Bounds on the Euclidean norm of a client's update, and of what it sends of its own, and on its examples; 0: none.

    Honest updates were measured up to 8 times the median (docs/security.md). Unusual classifiers within the bounds are
    the method's business (:mod:`cafe_flwr.methods.robust_teachers`).
    """

    max_norm: float = option(
        1e6,
        "A client whose update, or what it sends of its own, has a larger norm is left out of its round; 0: no bound.",
        key="federation.max-update-norm",
        ge=0,
        compare="all",
    )
    max_ratio: float = option(
        10.0,
        "Largest norm allowed, as a multiple of the median of the round's replies; 0: no bound, else greater than 1.",
        key="federation.max-update-ratio",
        ge=0,
        compare="all",
    )
    long_ratio: float = option(
        5.0,
        "In a mean, an update that is longer than this multiple of the median of the round's replies counts as one of "
        "median length; 0: as it is, else greater than 1.",
        key="federation.long-update-ratio",
        ge=0,
        compare="all",
    )
    max_examples_ratio: float = option(
        1000.0,
        "A client that says it has more training examples than this multiple of the median of all is left out; 0: no "
        "bound, else greater than 1.",
        key="federation.max-examples-ratio",
        ge=0,
        compare="all",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("max_ratio", "long_ratio", "max_examples_ratio"):
            if 0 < (ratio := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be greater than 1, or 0 for no bound, got {ratio}")


@section("privacy")
@dataclass(frozen=True)
class Privacy:
    """Clipping and noise of what clients send: norm C = ``clip_norm``, noise of standard deviation σC."""

    clip_norm: float = option(
        0.0,
        "Clients scale the update of the shared part down to this norm C before it is sent; 0: off (docs/security.md).",
        ge=0,
    )
    upload_clip_norm: float = option(0.0, "C of what a client sends of its own (its head); 0: as clip-norm.", ge=0)
    noise_multiplier: float = option(
        0.0, "σ: clients add Gaussian noise of standard deviation σC to what they send; 0: none.", ge=0
    )
    delta: float = option(1e-5, "δ at which the log states ε.", formerly="privacy-delta", gt=0, lt=1)
    report_metrics: bool = option(True, "Clients report accuracies, losses and similarities, which get no noise.")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.clip_norm and (self.noise_multiplier or self.upload_clip_norm):
            raise ValueError("noise_multiplier and upload_clip_norm need a clip_norm greater than 0: noise is σ·C")

    @property
    def on(self) -> bool:
        """Whether anything is clipped."""
        return self.clip_norm > 0

    def clip_of(self, kind: str) -> float:
        """C of the ``"shared"`` part or of the ``"upload"``."""
        return self.upload_clip_norm or self.clip_norm if kind == "upload" else self.clip_norm
