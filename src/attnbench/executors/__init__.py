"""Where workers run. `local`: as processes of this machine, one at a time."""
