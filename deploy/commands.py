"""The commands that start a SuperLink or a SuperNode, and the connection that users need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.certificates import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY


@dataclass(frozen=True)
class SuperLinkOptions:
    """How a SuperLink is started.

    Attributes
    ----------
    credentials
        Folder with the SuperLink's certificate and key and the authority's certificate. None: no TLS, and any node may
        join.
    host, port
        Where it listens; nodes and users call the same port.
    database
        File of its state, with which it knows nodes and their keys after a restart. None: in memory.
    """

    credentials: Path | None
    host: str = "127.0.0.1"
    port: int = 8000
    database: Path | None = None

    def command(self) -> list[str]:
        """The command line; apps run in the environment in which it is started, and nothing is installed for them."""
        security = ["--insecure"]
        if self.credentials is not None:
            security = [
                *("--ssl-ca-certfile", str(self.credentials / CA_CERTIFICATE)),
                *("--ssl-certfile", str(self.credentials / SERVER_CERTIFICATE)),
                *("--ssl-keyfile", str(self.credentials / SERVER_KEY)),
                "--enable-supernode-auth",
            ]
        database = [] if self.database is None else ["--database", str(self.database)]
        where = ["--host", self.host, "--port", str(self.port)]
        return ["flower-superlink", *security, *where, *database, "--disable-runtime-dependency-installation"]


@dataclass(frozen=True)
class SuperNodeOptions:
    """How a SuperNode is started.

    Attributes
    ----------
    superlink
        Address of the SuperLink, host:port.
    authority
        The certificate of the authority that signed the SuperLink's. None: no TLS.
    key
        The node's private key. None: the node does not authenticate.
    config
        Its node-config: clients, data-dir, state-dir, name.
    port
        Of loopback, for the node's own processes; different for each node of a machine.
    """

    superlink: str
    authority: Path | None
    key: Path | None
    config: Mapping[str, str | int | float | bool]
    port: int = 9094

    def command(self) -> list[str]:
        """The command line."""
        security = ["--insecure"] if self.authority is None else ["--root-certificates", str(self.authority)]
        key = [] if self.key is None else ["--auth-supernode-private-key", str(self.key)]
        where = ["--superlink", self.superlink, "--port", str(self.port)]
        return ["flower-supernode", *security, *key, *where, "--node-config", node_config(self.config)]


def node_config(config: Mapping[str, str | int | float | bool]) -> str:
    """A node-config as Flower reads it.

    Raises ValueError if a name or a value cannot be written in it.

    Examples
    --------
    >>> node_config({"clients": "0,3", "data-dir": "/srv/data", "port": 7, "shared": True})
    'clients="0,3" data-dir="/srv/data" port=7 shared=true'
    """
    pairs = []
    for key, value in config.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", key):
            raise ValueError(f"node-config has names of letters, digits, '-', '_' and '.', got {key!r}")
        if isinstance(value, str):
            if bad := re.search(r"[\"'\n=\\]", value):
                raise ValueError(f"node-config {key} must not contain {bad[0]!r}, got {value!r}")
            pairs.append(f'{key}="{value}"')
        else:
            pairs.append(f"{key}={str(value).lower()}")
    return " ".join(pairs)


def connection(name: str, address: str, authority: Path | None) -> str:
    """The lines for ``config.toml`` in Flower's home (``~/.flwr``) that make ``flwr run <app> <name>`` possible."""
    security = "insecure = true" if authority is None else f'root-certificates = "{authority}"'
    return f'[superlink.{name}]\naddress = "{address}"\n{security}\n'


def superlink_environment(options: SuperLinkOptions) -> str:
    """The file of settings that the unit ``cafe-superlink`` reads."""
    return f"CAFE_HOST={options.host}\nCAFE_PORT={options.port}\n"


def node_environment(node: str, options: SuperNodeOptions) -> str:
    """The file of settings that the unit ``cafe-supernode@<node>`` and the Compose file read.

    Raises ValueError if the config has no data-dir, or a value cannot be written in such a file.
    """
    if not options.config.get("data-dir"):
        raise ValueError("the units need the folder of the clients' data: --data-dir")
    node_config(options.config)  # refuses quotes and the like
    settings = {
        "CAFE_NODE": node,
        "CAFE_NAME": options.config.get("name", node),
        "CAFE_SUPERLINK": options.superlink,
        "CAFE_PORT": options.port,
        "CAFE_CLIENTS": options.config["clients"],
        "CAFE_DATA_DIR": options.config["data-dir"],
    }
    for key, value in settings.items():
        if bad := re.search(r"[\s$#\"']", str(value)):
            raise ValueError(f"{key} must not contain {bad[0]!r}, got {value!r}")
    return "".join(f"{key}={value}\n" for key, value in settings.items())
