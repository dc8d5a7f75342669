"""Evaluation of sources with records that cannot be read."""

import pytest

from jaxmllm.errors import InputError
from jaxmllm.eval.harness import evaluate
from tests.test_eval import gold, grounding_records


def test_unreadable_records_are_left_out_up_to_the_limit(tmp_path, caplog):
    class Torn(list):
        def __getitem__(self, index):
            if index in (1, 3):
                raise InputError(f"annotations.json, record {index}: torn")
            return super().__getitem__(index)

    class AllTorn(list):
        def __getitem__(self, index):
            raise InputError("torn")

    records = Torn({**record, "id": i} for i, record in enumerate(grounding_records(5)))
    got = evaluate(gold, records, out_dir=tmp_path / "some", max_bad_records=2, batch_size=2, n_resamples=5)
    assert got.sources["grounding"].n == 3 and caplog.text.count("left out: annotations.json, record") == 2
    with pytest.raises(InputError, match="^annotations.json, record 1: torn$"):
        evaluate(gold, records, out_dir=tmp_path / "none")
    with pytest.raises(InputError, match="record 3: torn; 2 records failed, max_bad_records is 1"):
        evaluate(gold, records, out_dir=tmp_path / "one", max_bad_records=1)
    with pytest.raises(InputError, match="no record could be read"):
        evaluate(gold, AllTorn([{}]), out_dir=tmp_path / "all", max_bad_records=9)
