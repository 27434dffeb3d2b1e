"""Facts about architectures: `config.json` to `ArchSpec`, weight names, arithmetic. Never imports torch."""
