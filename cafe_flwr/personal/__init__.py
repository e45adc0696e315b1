"""Personal networks of clients: how they are stored, published, calibrated, evaluated and exported."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.app.finished_run import FinishedRun as FinishedRun
    from cafe_flwr.networks.fingerprint import fingerprint as fingerprint
    from cafe_flwr.personal.published import PersonalNetwork as PersonalNetwork
    from cafe_flwr.personal.published import PersonalNetworks as PersonalNetworks

__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.app.finished_run": "FinishedRun",
        "cafe_flwr.networks.fingerprint": "fingerprint",
        "cafe_flwr.personal.published": "PersonalNetwork PersonalNetworks",
    },
)
