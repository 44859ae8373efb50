"""Checkpoints: what a run needs to go on exactly where it was, safe against a kill at any moment.

    checkpoints/
      step-00000120-accuracy=0.9721/    or step-00000120 where no metric was taken at that step
        shared.safetensors        what all ranks hold alike: model parameters, optimizer, counters, history
        rank-00003.safetensors    what rank 3 alone holds: BatchNorm's running statistics, random generators
        manifest.json             version, step, metric, world size, and size and SHA-256 of each file; written last
      .step-00000130.3.partial/   being written, or left by a kill: never read, removed when the run goes on

Files hold tensors and plain values and are read as that alone: loading a checkpoint runs no code of its author's.
Only `tensors` loads torch, and only `load` and `load_shared`, or a `Saver` that is handed tensors, need it.
"""

from ddp.checkpoint.manifest import VERSION, FileEntry, Manifest
from ddp.checkpoint.names import MANIFEST, SHARED, Metric, find, rank_file, resolve
from ddp.checkpoint.ownership import check_run
from ddp.checkpoint.publishing import clear_left_overs, set_aside
from ddp.checkpoint.reading import load, load_part, load_shared, newest, read_manifest, verify
from ddp.checkpoint.saver import Saver, Settled
from ddp.checkpoint.space import check_space
from ddp.checkpoint.staging import RawTensor

__all__ = [
    "MANIFEST",
    "SHARED",
    "VERSION",
    "FileEntry",
    "Manifest",
    "Metric",
    "RawTensor",
    "Saver",
    "Settled",
    "check_run",
    "check_space",
    "clear_left_overs",
    "find",
    "load",
    "load_part",
    "load_shared",
    "newest",
    "rank_file",
    "read_manifest",
    "resolve",
    "set_aside",
    "verify",
]
