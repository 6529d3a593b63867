"""Moving weights between disk, host and device, while a model runs."""
