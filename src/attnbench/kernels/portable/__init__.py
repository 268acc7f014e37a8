"""Kernels in Triton alone, for any GPU it supports."""
