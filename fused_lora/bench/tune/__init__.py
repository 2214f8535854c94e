"""Which tiles are fastest on this device, measured and kept (``fused-lora tune``)."""
