"""The tasks, one file each: data, metric and shortcut baselines."""
