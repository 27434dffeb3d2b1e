"""The one composition root: from a `RunConfig` and a `Plan` to tokenizer, model, adapter, batches and trainer.

Everything here may import every room but `cli`; nothing but `cli` and `api` imports this.
"""
