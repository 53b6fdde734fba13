"""The record, its summary and its CSV row."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlab.common.errors import ResultsError
from speedlab.measure import record as records
from speedlab.measure.summary import percentile, spread


def test_round_trip(make_record):
    record = make_record(warnings=("careful",))
    again = records.from_json(record.to_json())
    assert again.to_json() == record.to_json()


def test_json_has_no_nan_or_infinity(make_record):
    record = make_record(quality={"psnr": math.inf, "ssim": math.nan})
    assert json.loads(record.to_json())["quality"] == {"psnr": None, "ssim": None}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"schema": 3}', '{"schema": 2}', '{"schema": 1}', "null", '{"schema": 1, "run_id": "../x"}'],
)
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ResultsError):
        records.from_json(text)


def test_a_half_written_record_is_refused_at_every_length(make_record):
    whole = make_record().to_json()
    for end in range(0, len(whole) - 1, 7):
        with pytest.raises(ResultsError):
            records.from_json(whole[:end])


def test_csv_columns_are_the_public_ones_in_order():
    assert ",".join(records.CSV_COLUMNS) == (
        "plan,max_vram_gb,time_s,time_mean_s,step_time_s,batch,width,height,steps,cfg,sampler,scheduler,precision,"
        "accelerators,repeats,time_min_s,time_max_s,time_std_s,first_eval_s,it_per_s,images_per_min,peak_rss_gb,psnr,"
        "ssim,status,error,scenario,checkpoint,seed,device,torch,comfyui,speedlab,env_hash,run_id,timestamp"
    )


def test_csv_row_counts_text_to_saved_picture_without_load(make_record):
    row = records.csv_row(make_record())
    assert row["time_s"] == "2.5"
    assert row["time_min_s"] == "2.4"
    assert row["time_max_s"] == "2.7"
    assert row["max_vram_gb"] == "7.4"
    assert row["peak_rss_gb"] == "3"
    assert row["precision"] == "fp16 computed in fp32"
    assert row["accelerators"] == "tiny_vae(taesd)"
    assert row["seed"] == str(2**64 - 1)
    assert row["first_eval_s"] == "0.13"


def test_the_row_of_a_run_with_a_cached_text_has_no_time(make_record):
    phases = {**make_record().phases_ms, "text_encode": "cached"}
    row = records.csv_row(make_record(phases_ms=phases))
    assert (row["time_s"], row["time_mean_s"], row["time_min_s"]) == ("", "", "")


def test_csv_row_of_a_failed_run_has_its_error_on_one_line(make_record):
    row = records.csv_row(
        make_record(status="oom", error="OutOfMemoryError: no\nmore", summary={}, memory={}, steps=[])
    )
    assert row["status"] == "oom"
    assert row["error"] == "OutOfMemoryError: no more"
    assert row["time_s"] == ""


def test_moves_of_weights_count_and_a_cached_or_unknown_phase_leaves_the_total_unknown():
    phases = {"text_encode": 5.0, "prepare": None, "decode": 10.0, "save": None}
    assert records.total_ms(phases, 100.0) == 115.0
    assert records.total_ms({**phases, "to_device": 40.0}, 100.0) == 155.0
    assert records.total_ms({**phases, "free": 7.0}, 100.0) == 122.0
    assert records.total_ms({**phases, "free": "cached"}, 100.0) == 115.0, "what moved nothing took no time"
    assert records.total_ms({**phases, "text_encode": "cached"}, 100.0) is None
    assert records.total_ms({**phases, "decode": "cached"}, 100.0) is None
    assert records.total_ms(phases, None) is None
    assert records.total_ms({**phases, "text_encode": None}, 100.0) is None
    assert records.total_ms({**phases, "decode": None}, 100.0) is None
    assert records.total_ms({**phases, "decode": None, "after_sampling": 30.0}, 100.0) == 135.0


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@x"])
def test_no_cell_is_read_as_a_formula(make_record, text):
    assert records.csv_row(make_record(request={"plan": text}))["plan"] == "'" + text
    assert records.csv_row(make_record(request={"cfg": -1.5}))["cfg"] == "-1.5"


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50))
def test_spread_is_ordered(values):
    s = spread(values)
    tolerance = 1e-9 * s.max
    assert s.min <= s.p10 + tolerance
    assert s.p10 <= s.median + tolerance
    assert s.median <= s.p90 + tolerance
    assert s.p90 <= s.max + tolerance
    assert s.std >= 0


def test_percentile_interpolates():
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.1) == pytest.approx(1.4)
    with pytest.raises(ValueError, match="empty"):
        percentile([], 0.5)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_survives_the_csv(make_record, plan, error):
    row = records.csv_row(make_record(request={"plan": plan}, error=error))
    assert set(row) == set(records.CSV_COLUMNS)
    assert all("\n" not in cell and "\r" not in cell for cell in row.values())
