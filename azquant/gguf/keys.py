"""Makers of metadata values, and the names of well-known keys.

>>> from azquant.gguf import keys
>>> metadata = {
...     keys.ARCHITECTURE: keys.string("gpt2"),
...     keys.of_architecture("gpt2", keys.CONTEXT_LENGTH): keys.u32(256),
... }

Source of the names: the GGUF specification (docs/gguf.md of ggml).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from azquant.gguf.encoding import MetadataValue
from azquant.gguf.values import ValueType

__all__ = [
    "ADD_BOS_TOKEN",
    "ADD_EOS_TOKEN",
    "ADD_SPACE_PREFIX",
    "ALIGNMENT",
    "ARCHITECTURE",
    "ATTENTION_HEAD_COUNT",
    "ATTENTION_HEAD_COUNT_KV",
    "ATTENTION_KEY_LENGTH",
    "ATTENTION_LAYER_NORM_EPSILON",
    "ATTENTION_LAYER_NORM_RMS_EPSILON",
    "ATTENTION_VALUE_LENGTH",
    "AUTHOR",
    "BASENAME",
    "BLOCK_COUNT",
    "BOS_TOKEN_ID",
    "CHAT_TEMPLATE",
    "CONTEXT_LENGTH",
    "DESCRIPTION",
    "EMBEDDING_LENGTH",
    "EOS_TOKEN_ID",
    "EOT_TOKEN_ID",
    "FEED_FORWARD_LENGTH",
    "FILE_TYPE",
    "FILE_TYPES",
    "FINETUNE",
    "LANGUAGES",
    "LICENSE",
    "LICENSE_LINK",
    "LICENSE_NAME",
    "MASK_TOKEN_ID",
    "MERGES",
    "NAME",
    "ORGANIZATION",
    "PADDING_TOKEN_ID",
    "PRECOMPILED_CHARSMAP",
    "QUANTIZATION_VERSION",
    "QUANTIZED_BY",
    "REMOVE_EXTRA_WHITESPACES",
    "ROPE_DIMENSION_COUNT",
    "ROPE_FREQ_BASE",
    "ROPE_SCALING_FACTOR",
    "ROPE_SCALING_ORIGINAL_CONTEXT_LENGTH",
    "ROPE_SCALING_TYPE",
    "SCORES",
    "SEPARATOR_TOKEN_ID",
    "SIZE_LABEL",
    "SOURCE_URL",
    "SPLIT_COUNT",
    "SPLIT_NO",
    "SPLIT_TENSORS_COUNT",
    "TAGS",
    "TOKENIZER_JSON",
    "TOKENIZER_MODEL",
    "TOKENIZER_PRE",
    "TOKENIZER_SOURCE",
    "TOKENS",
    "TOKEN_TYPE",
    "TYPE",
    "UNKNOWN_TOKEN_ID",
    "URL",
    "VERSION",
    "VOCAB_SIZE",
    "TokenType",
    "array",
    "boolean",
    "f32",
    "f64",
    "i8",
    "i16",
    "i32",
    "i64",
    "of_architecture",
    "string",
    "u8",
    "u16",
    "u32",
    "u64",
]

# About the file
TYPE = "general.type"
ARCHITECTURE = "general.architecture"
ALIGNMENT = "general.alignment"
FILE_TYPE = "general.file_type"
QUANTIZATION_VERSION = "general.quantization_version"
QUANTIZED_BY = "general.quantized_by"
NAME = "general.name"
BASENAME = "general.basename"
FINETUNE = "general.finetune"
SIZE_LABEL = "general.size_label"
VERSION = "general.version"
AUTHOR = "general.author"
ORGANIZATION = "general.organization"
DESCRIPTION = "general.description"
LICENSE = "general.license"
LICENSE_NAME = "general.license.name"
LICENSE_LINK = "general.license.link"
URL = "general.url"
SOURCE_URL = "general.source.url"
TAGS = "general.tags"
LANGUAGES = "general.languages"

# About the model: what follows the architecture's name, see of_architecture
VOCAB_SIZE = "vocab_size"
CONTEXT_LENGTH = "context_length"
EMBEDDING_LENGTH = "embedding_length"
BLOCK_COUNT = "block_count"
FEED_FORWARD_LENGTH = "feed_forward_length"
ATTENTION_HEAD_COUNT = "attention.head_count"
ATTENTION_HEAD_COUNT_KV = "attention.head_count_kv"
ATTENTION_KEY_LENGTH = "attention.key_length"
ATTENTION_VALUE_LENGTH = "attention.value_length"
ATTENTION_LAYER_NORM_EPSILON = "attention.layer_norm_epsilon"
ATTENTION_LAYER_NORM_RMS_EPSILON = "attention.layer_norm_rms_epsilon"
ROPE_DIMENSION_COUNT = "rope.dimension_count"
ROPE_FREQ_BASE = "rope.freq_base"
ROPE_SCALING_TYPE = "rope.scaling.type"
ROPE_SCALING_FACTOR = "rope.scaling.factor"
ROPE_SCALING_ORIGINAL_CONTEXT_LENGTH = "rope.scaling.original_context_length"

# About the tokenizer
TOKENIZER_MODEL = "tokenizer.ggml.model"
TOKENIZER_PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPE = "tokenizer.ggml.token_type"
SCORES = "tokenizer.ggml.scores"
MERGES = "tokenizer.ggml.merges"
BOS_TOKEN_ID = "tokenizer.ggml.bos_token_id"
EOS_TOKEN_ID = "tokenizer.ggml.eos_token_id"
EOT_TOKEN_ID = "tokenizer.ggml.eot_token_id"
UNKNOWN_TOKEN_ID = "tokenizer.ggml.unknown_token_id"
SEPARATOR_TOKEN_ID = "tokenizer.ggml.seperator_token_id"  # spelled so in every file there is
PADDING_TOKEN_ID = "tokenizer.ggml.padding_token_id"
MASK_TOKEN_ID = "tokenizer.ggml.mask_token_id"
ADD_BOS_TOKEN = "tokenizer.ggml.add_bos_token"
ADD_EOS_TOKEN = "tokenizer.ggml.add_eos_token"
ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
REMOVE_EXTRA_WHITESPACES = "tokenizer.ggml.remove_extra_whitespaces"
PRECOMPILED_CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
TOKENIZER_SOURCE = "azquant.tokenizer.source"  # "sentencepiece" where TOKENIZER_JSON was made of its model
TOKENIZER_JSON = "tokenizer.huggingface.json"
CHAT_TEMPLATE = "tokenizer.chat_template"

# About a model spread over several files
SPLIT_NO = "split.no"
SPLIT_COUNT = "split.count"
SPLIT_TENSORS_COUNT = "split.tensors.count"

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
"""``general.file_type`` by the name of the type that most of a file's tensors have."""


class TokenType(IntEnum):
    """The numbers of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def of_architecture(architecture: str, name: str) -> str:
    """The key of a hyperparameter: ``of_architecture("gpt2", BLOCK_COUNT)`` is ``"gpt2.block_count"``."""
    return f"{architecture}.{name}"


def u8(value: int) -> MetadataValue:
    """An unsigned 8-bit integer. Like all makers here, raises ArgumentError for what does not fit."""
    return MetadataValue(ValueType.UINT8, value)


def i8(value: int) -> MetadataValue:
    """A signed 8-bit integer."""
    return MetadataValue(ValueType.INT8, value)


def u16(value: int) -> MetadataValue:
    """An unsigned 16-bit integer."""
    return MetadataValue(ValueType.UINT16, value)


def i16(value: int) -> MetadataValue:
    """A signed 16-bit integer."""
    return MetadataValue(ValueType.INT16, value)


def u32(value: int) -> MetadataValue:
    """An unsigned 32-bit integer."""
    return MetadataValue(ValueType.UINT32, value)


def i32(value: int) -> MetadataValue:
    """A signed 32-bit integer."""
    return MetadataValue(ValueType.INT32, value)


def u64(value: int) -> MetadataValue:
    """An unsigned 64-bit integer."""
    return MetadataValue(ValueType.UINT64, value)


def i64(value: int) -> MetadataValue:
    """A signed 64-bit integer."""
    return MetadataValue(ValueType.INT64, value)


def f32(value: float) -> MetadataValue:
    """A 32-bit float: ``value`` is rounded to the nearest."""
    return MetadataValue(ValueType.FLOAT32, value)


def f64(value: float) -> MetadataValue:
    """A 64-bit float."""
    return MetadataValue(ValueType.FLOAT64, value)


def boolean(value: bool) -> MetadataValue:
    """True or false."""
    return MetadataValue(ValueType.BOOL, value)


def string(value: str) -> MetadataValue:
    """A string, stored as UTF-8."""
    return MetadataValue(ValueType.STRING, value)


def array(element_type: ValueType, items: Any) -> MetadataValue:
    """An array of ``element_type``, from a sequence or a one-dimensional NumPy array."""
    return MetadataValue(ValueType.ARRAY, items, element_type)
