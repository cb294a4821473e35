"""What `tools/gpu_check.py` checks. Each takes a mesh or a platform and returns an `Outcome`; none names a device."""
