"""Data sets, and how they are dealt out to clients."""

from typing import TYPE_CHECKING

from cafe_flwr.core.lazy import lazily

if TYPE_CHECKING:
    from cafe_flwr.data.federation import FederatedData as FederatedData
    from cafe_flwr.data.federation import load_federation as load_federation
    from cafe_flwr.data.shifts import rotate as rotate
    from cafe_flwr.data.shifts import shift_labels as shift_labels
    from cafe_flwr.data.split import ClientData as ClientData
    from cafe_flwr.data.split import Split as Split

__getattr__ = lazily(
    __name__,
    {
        "cafe_flwr.data.federation": "FederatedData load_federation",
        "cafe_flwr.data.shifts": "rotate shift_labels",
        "cafe_flwr.data.split": "ClientData Split",
    },
)
