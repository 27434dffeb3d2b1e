"""A source of the YAML as the data room calls it: apart from the rest, for `stoker check` to import nothing heavy."""

from stoker import builtin
from stoker.config.row_formats import expanded
from stoker.config.schema import Source
from stoker.data.options import ChatOptions, PromptTexts, SourceOptions


def source_options(source: Source) -> SourceOptions:
    """Returns a source as the data room calls it."""
    source = expanded(source)
    path = str(builtin.resolve_rows(source.path)) if builtin.is_builtin(source.path) else source.path
    chat = source.chat.model_dump()
    train_on = chat.pop("train_on")
    return SourceOptions(
        path=path,
        format=source.format,
        fields=source.fields.model_dump(exclude_none=True, exclude={"message_properties"}),
        split=source.split,
        name=source.name,
        limit=source.limit,
        file_type=source.file_type,
        chat=ChatOptions(
            **chat,
            message_properties=source.fields.message_properties,
            train_on=(train_on,) if isinstance(train_on, str) else None if train_on is None else tuple(train_on),
        ),
        prompt=PromptTexts(**source.prompt.model_dump()),
        data_files=tuple(source.data_files),
        revision=source.revision,
        shard=source.shard.index if source.shard else 0,
        num_shards=source.shard.num if source.shard else 1,
        weight=source.weight,
    )
