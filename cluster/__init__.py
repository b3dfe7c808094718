"""Everything that knows of ranks or writes files: processes, sharding, checkpoints, files, run folders, FLOPs."""
