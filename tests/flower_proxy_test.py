"""The reverse proxy of docs/flower.md before Flower's own SuperLink: hospitals reach their part of
it, and nobody the others. The configuration is read from that page.
"""

import pathlib
import re
import shutil
import subprocess
import time

import pytest

pytest.importorskip("flwr")

from experiments import trial

pytestmark = [
  pytest.mark.flower,
  pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "flower.md"
LIST = ["flwr", "supernode", "list", "trial"]


def configuration(deployment, port, folder):
  """That of the docs, with this machine's port, certificates and folder."""
  (text,) = re.findall(r"```nginx\n(.*?)```", DOCS.read_text(), re.DOTALL)
  at = {name: deployment.flower / f"{name}.pem" for name in ("certificate", "key", "authority")}
  for old, new in {
    "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
    "server.pem": str(at["certificate"]),
    "server.key": str(at["key"]),
    "ca.crt": str(at["authority"]),
    "127.0.0.1:9093": f"127.0.0.1:{deployment.port}",
    "coordinator.example": "localhost",
  }.items():
    assert old in text, old
    text = text.replace(old, new)
  temporary = "".join(
    f"{kind}_temp_path {folder}/{kind};\n"
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
  )
  return (
    f"daemon off; pid {folder}/pid; error_log stderr;\nevents {{}}\n"
    f"http {{\naccess_log {folder}/access.log;\n{temporary}{text}}}\n"
  )


def ask(deployment, port):
  """What the operator's command says at a port, or the error."""
  home = deployment.flower / "home" / "config.toml"
  before = home.read_text()
  home.write_text(before.replace(f":{deployment.port}", f":{port}"))
  try:
    done = subprocess.run(
      LIST, env=trial._environment(home.parent), capture_output=True, text=True, check=False
    )
  finally:
    home.write_text(before)
  return done.returncode, done.stdout + done.stderr


def test_hospitals_reach_their_part_through_the_proxy_and_nobody_the_others(tmp_path):
  port = trial.free_port()
  (tmp_path / "run").mkdir()
  with trial.deployed(1, tmp_path / "run", tmp_path / "own") as deployment:
    folder = tmp_path / "nginx"
    folder.mkdir()
    (folder / "nginx.conf").write_text(configuration(deployment, port, folder))
    trial.start(deployment, "proxy", ["nginx", "-c", str(folder / "nginx.conf")], folder)
    trial.wait_for(deployment, "proxy", port)
    deployment.processes.pop("supernode 0").kill()  # it went past the proxy
    trial.start_supernode(deployment._replace(port=port), 0)
    end, log = time.monotonic() + 60, folder / "access.log"
    while not (log.is_file() and "pull-messages" in log.read_text().lower().replace("_", "-")):
      assert time.monotonic() < end, (log.read_text(), deployment.log("supernode 0").read_text())
      time.sleep(0.2)
    fleet = [line for line in log.read_text().splitlines() if "/v1/fleet/" in line]
    assert fleet
    assert all('" 200 ' in line for line in fleet), fleet
    assert ask(deployment, deployment.port)[0] == 0  # the command is right: it works past the proxy
    code, said = ask(deployment, port)
    assert code != 0, said
    refused = [line for line in log.read_text().splitlines() if "/v1/control/" in line]
    assert refused
    assert all('" 404 ' in line for line in refused), refused
