"""Reads TensorBoard's event files."""

import struct

from tensorboardX.proto.event_pb2 import Event


def events(workdir):
  """All events of a directory: a record is length (8 bytes), CRC (4), content, CRC (4)."""
  found = []
  for path in (workdir / "tensorboard").iterdir():
    content, position = path.read_bytes(), 0
    while position < len(content):
      (length,) = struct.unpack_from("<Q", content, position)
      found.append(Event.FromString(content[position + 12 : position + 12 + length]))
      position += 16 + length
  return found
