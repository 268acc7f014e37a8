"""Measurements of one cell, inside its worker process: time, memory, the kernels that ran, the device's state."""
