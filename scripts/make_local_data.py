"""Write a small made-up copy of one of the hub's data sets, in the hub's columns and file names.

python scripts/make_local_data.py cifar100 /tmp/copies     # then: data-dir = "/tmp/copies"

It is noise with a trace of the label, to see that everything runs where there is no network.
"""

import argparse
from pathlib import Path

from cafe_flwr.data.hub import HUB_SETS
from cafe_flwr.data.stand_ins import write_stand_in


def main() -> None:
    """Read the command line, write the set."""
    parser = argparse.ArgumentParser(description="Write a small made-up copy of one of the hub's data sets.")
    parser.add_argument("name", choices=list(HUB_SETS))
    parser.add_argument("folder", type=Path, help="the set goes to a folder of its name below")
    parser.add_argument("--rows", type=int, default=600, help="all splits together (600)")
    arguments = parser.parse_args()
    try:
        home = write_stand_in(arguments.folder.expanduser().resolve(), arguments.name, arguments.rows)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.rows} rows in {home / arguments.name}; to use them: data-dir = '{home}'")


if __name__ == "__main__":
    main()
