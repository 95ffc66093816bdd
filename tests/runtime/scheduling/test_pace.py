import pytest

from llmopt.runtime.scheduling.pace import Pace


def test_everything_is_written_while_nobody_waits_for_a_token():
    pace = Pace(0.1, least=32, most=512)
    pace.note_prefill(100, 10.0)
    assert pace.budget(0) == 512


def test_nothing_is_held_back_before_anything_was_measured():
    assert Pace(0.1, least=32, most=512).budget(3) == 512


def test_prompts_get_the_time_that_decoding_leaves():
    pace = Pace(0.1, least=32, most=512)
    pace.note_prefill(100, 0.05)
    pace.note_decode(0.02)
    assert pace.budget(3) == pytest.approx(160, abs=1)


def test_prompts_get_as_much_time_as_decoding_where_the_target_cannot_be_kept():
    pace = Pace(0.1, least=32, most=512)
    pace.note_prefill(100, 0.05)
    pace.note_decode(0.2)
    assert pace.budget(3) == pytest.approx(400, abs=1)


def test_a_step_reads_the_least_in_any_case():
    pace = Pace(0.1, least=32, most=512)
    pace.note_prefill(100, 10.0)
    pace.note_decode(0.02)
    assert pace.budget(3) == 32


def test_no_target_is_no_limit():
    pace = Pace(0, least=32, most=512)
    pace.note_prefill(100, 10.0)
    assert pace.budget(3) == 512


def test_short_chunks_do_not_count():
    pace = Pace(0.1, least=32, most=512)
    pace.note_prefill(2, 1.0)
    assert pace.seconds_per_token == 0


def test_averages_follow_what_is_measured():
    pace = Pace(0.1, least=32, most=512)
    for _ in range(50):
        pace.note_decode(0.02)
    assert pace.seconds_per_decode == pytest.approx(0.02)
    pace.note_decode(0.04)
    assert 0.02 < pace.seconds_per_decode < 0.04


def test_a_request_takes_as_long_as_its_tokens():
    pace = Pace(0.1, least=1, most=512)
    pace.note_prefill(100, 0.1)
    pace.note_decode(0.02)
    assert pace.seconds_for(50, 10) == pytest.approx(0.25)
