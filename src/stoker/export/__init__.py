"""What a run leaves behind: adapters in PEFT's format, merged models in Hugging Face's."""
