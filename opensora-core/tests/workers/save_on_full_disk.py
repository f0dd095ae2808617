"""Saves a checkpoint under each of several limits on a file's size; reports what was said and what is left."""

import json
import resource
import sys
from pathlib import Path

import torch

from opensora.core import CheckpointError
from opensora.core.checkpoints import Checkpoint, read_checkpoint, save_checkpoint

folder = Path(sys.argv[1])
weights = torch.arange(3000.0)
checkpoint = Checkpoint(
    tensors={"model": {"weight": weights}}, optimizer={"momentum": weights.repeat(2)}, state={"note": "x" * 30_000}
)
save_checkpoint(folder, 1, checkpoint)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save_checkpoint(folder, 2, checkpoint)
        said = None
    except CheckpointError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    intact = torch.equal(read_checkpoint(folder / "step-000001").tensors["model"]["weight"], weights)
    print(json.dumps({"said": said, "left": [path.name for path in folder.iterdir()], "intact": intact}), flush=True)
