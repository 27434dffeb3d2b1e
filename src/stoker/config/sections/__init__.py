"""The sections of a run's YAML, one file each; `stoker.config.schema` puts them together."""
