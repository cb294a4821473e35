"""What `tools/gpu_check.py` checks. Each check takes a mesh or a platform and returns an `Outcome`; none names a device."""
