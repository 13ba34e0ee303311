"""The ClientApp: it hands each message to the hospital's own process, and returns the answer.

Flower starts it as a process for each message, so it imports neither JAX nor the rest of the
library. The SuperNode names the site's folder: `--node-config 'site-folder="FOLDER"'`. Flower's
simulation engine has no SuperNodes; there the run's configuration names the folder of all sites'.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from primia_jax.flower import channel

app = ClientApp()


@app.query()
def carry(message: Message, context: Context) -> Message:
  """Carries one message.

  Raises:
    ValueError: as `site_folder`.
    TimeoutError: as `channel.relay`. Flower tells the coordinator, for whom the site is lost.
  """
  folder = site_folder(context.node_config, context.run_config)
  told = message.content["primia"]
  request, waits = told["message"], bool(told["waits"])
  assert isinstance(request, bytes)
  left = message.metadata.created_at + message.metadata.ttl - time.time()
  # A clock that is off must not keep a message for longer than it may live.
  timeout = min(max(left, 1.0), message.metadata.ttl)
  answer = channel.relay(folder, request, timeout, waits)
  return Message(RecordDict({"primia": ConfigRecord({"message": answer})}), reply_to=message)


def site_folder(node: Mapping[str, Any], run: Mapping[str, Any]) -> pathlib.Path:
  """The folder with the channel of a node's site.

  The coordinator writes the run's configuration. So that names no folder of a SuperNode, but of the
  simulation engine's nodes alone, which have a number among so many.

  Args:
    node: the node's configuration: `site-folder`, or of the simulation engine `partition-id` and
      `num-partitions`.
    run: the run's: in a simulation `sites`, the folder in which that of site N is `site_N`.

  Raises:
    ValueError: no folder is named.
  """
  if "site-folder" in node:
    return pathlib.Path(str(node["site-folder"]))
  if {"partition-id", "num-partitions"} <= set(node) and run.get("sites"):
    return pathlib.Path(str(run["sites"])) / f"site_{int(node['partition-id'])}"
  raise ValueError(
    "this node names no folder of a site; start the SuperNode with --node-config "
    '\'site-folder="FOLDER"\', or in a simulation the run with sites="FOLDER" in --run-config'
  )
