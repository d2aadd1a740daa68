"""Rows from data sets of Python, and what no `Rows` may hold."""

import pytest
from torch.utils.data import Dataset

from switchkd.data import Rows, rows_from

RECORDS = [{"prompt": f"say {i}", "completion": str(i)} for i in range(3)]


class MapStyle(Dataset):
    """Knows an item for each index, past its length, too."""

    def __len__(self):
        return len(RECORDS)

    def __getitem__(self, index):
        assert index < 99, "read far past its end"
        return RECORDS[index % len(RECORDS)]


def test_a_map_style_data_set_is_read_to_its_length(tokenizer):
    rows = rows_from(MapStyle(), tokenizer, 40, 9).rows
    assert rows == rows_from(RECORDS, tokenizer, 40, 9).rows and len(rows) == 3


def test_rows_of_one_id_are_refused(tokenizer):
    one, other = (rows_from(RECORDS[:n], tokenizer, 40, 9) for n in (2, 1))
    with pytest.raises(ValueError, match="rows: got the id 1 twice, expected another for each row"):
        Rows(one.rows + other.rows, one.report)
    assert len(Rows([], one.report)) == 0
