"""The machine around a run: commands, memory, processes, signals, disk and network."""
