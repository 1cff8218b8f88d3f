"""What a run needs on TPU chips, found by compiling its programs."""
