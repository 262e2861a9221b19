"""Training by Lightning: module, callbacks, parameter groups, run folder, reports, pictures."""
