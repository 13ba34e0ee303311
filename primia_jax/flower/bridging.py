"""The ClientApp: it hands each message to the hospital's own process, and returns the answer.

Flower starts it as a process for each message, so it imports neither JAX nor the rest of the
library. The SuperNode names the site's folder: `--node-config 'site-folder="FOLDER"'`.
"""

from __future__ import annotations

import pathlib
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from primia_jax.flower import channel

app = ClientApp()


@app.query()
def carry(message: Message, context: Context) -> Message:
  """Carries one message.

  Raises:
    KeyError: the SuperNode names no folder.
    TimeoutError: as `channel.relay`. Flower tells the coordinator, for whom the site is lost.
  """
  folder = pathlib.Path(str(context.node_config["site-folder"]))
  told = message.content["primia"]
  request, waits = told["message"], bool(told["waits"])
  assert isinstance(request, bytes)
  left = message.metadata.created_at + message.metadata.ttl - time.time()
  # A clock that is off must not keep a message for longer than it may live.
  timeout = min(max(left, 1.0), message.metadata.ttl)
  answer = channel.relay(folder, request, timeout, waits)
  return Message(RecordDict({"primia": ConfigRecord({"message": answer})}), reply_to=message)
