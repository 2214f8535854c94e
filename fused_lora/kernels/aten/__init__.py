"""Library GEMMs with in-place accumulation: serves on every device torch runs on."""
