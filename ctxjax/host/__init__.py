"""The machine around a run: commands, processes, signals, disk and network."""
