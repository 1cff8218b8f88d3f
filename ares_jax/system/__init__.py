"""Devices, processes, configs and commands: what a run needs that is not about ARES."""
