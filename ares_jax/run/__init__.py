"""From a config to the parts of a run, and the files of its folder."""
