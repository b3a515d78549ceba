"""Instructions: records to conversations, through prompt or chat templates to pieces of text, to ids and mask.

The mask is built from the pieces, and never by searching the finished ids. The ids of a prompt in training are exactly
the ids of that prompt in generation.
"""

from tsumugu.data.instructions.encode import (
    check_template,
    encode_conversations,
    learns_earlier_replies,
    prompt_ids,
    writes_bos,
)
from tsumugu.data.instructions.records import (
    FIELDS,
    Message,
    UnusableError,
    check_turns,
    columns_for,
    from_json,
    messages_of,
    prompt_of,
    question_key,
    to_json,
)
from tsumugu.data.instructions.templates import (
    TEMPLATES,
    Segment,
    Template,
    definition,
    find_template,
    jinja_of,
)

__all__ = [
    "FIELDS",
    "TEMPLATES",
    "Message",
    "Segment",
    "Template",
    "UnusableError",
    "check_template",
    "check_turns",
    "columns_for",
    "definition",
    "encode_conversations",
    "find_template",
    "from_json",
    "jinja_of",
    "learns_earlier_replies",
    "messages_of",
    "prompt_ids",
    "prompt_of",
    "question_key",
    "to_json",
    "writes_bos",
]
