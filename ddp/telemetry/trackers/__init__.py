"""What is told of a run beside its record: log.jsonl always, TensorBoard, MLflow and Weights & Biases where named.

A tracker's library runs in a process of its own (`worker`), which rank 0's thread for it talks to (`tracker`): its
imports, threads, hooks and hangs never reach the process that trains, and it can be ended at any moment.
"""
