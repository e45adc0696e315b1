"""What a client keeps of its own, and what is measured and published of it."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.app.finished_run import FinishedRun as FinishedRun
    from cafe_flwr.networks.fingerprint import fingerprint as fingerprint
    from cafe_flwr.personal.published import Personal as Personal
    from cafe_flwr.personal.published import PersonalNetworks as PersonalNetworks

__all__ = [
    "FinishedRun",
    "Personal",
    "PersonalNetworks",
    "fingerprint",
]

__getattr__ = lazily(
    __name__,
    {
        "FinishedRun": "cafe_flwr.app.finished_run",
        "Personal": "cafe_flwr.personal.published",
        "PersonalNetworks": "cafe_flwr.personal.published",
        "fingerprint": "cafe_flwr.networks.fingerprint",
    },
)
