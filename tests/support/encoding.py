"""The bulk encoder with lists in place of arrays, for tests that compare ids with those of other engines."""

from tsumugu.tokenizer import load


class BulkEncoder(load.BulkEncoder):
    def __call__(self, texts: list[str]) -> list[list[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [ids.tolist() for ids in super().__call__(texts)]
