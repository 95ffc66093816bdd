from llmopt.benchmarks.child import Finished
from llmopt.benchmarks.quantization import points, table
from llmopt.benchmarks.quantizers.compare import Result
from llmopt.benchmarks.quantizers.judge import Figures, Size
from llmopt.benchmarks.quantizers.rows import Row

GOOD = Result(
    Row("gptq-w4", "gptq", "W4A16 g32"),
    "llmopt",
    Finished("", 12.4, 2_000_000_000),
    Figures(perplexity=22.0, source_perplexity=20.0, kl=0.1, top1=0.75),
    Size(bits=9_000_000, weights=2_000_000),
)
FAILED = Result(Row("peer", "gptq", "W4A16 g32", program="peer"), "Peer 1.0", error="Error: a | b")


def test_every_row_is_in_the_table_also_one_that_failed() -> None:
    header, _, good, failed = table([GOOD, FAILED]).splitlines()
    cells = [cell.strip() for cell in good.strip("|").split("|")]
    assert cells[4:] == ["22.000", "+10.00%", "0.1000", "75.00%", "1.1", "4.50", "12", "2.00"]
    assert "failed: Error: a / b" in failed
    assert header.count("|") == good.count("|") == failed.count("|")


def test_only_what_ran_and_lost_something_is_drawn() -> None:
    exact = Result(GOOD.row, "llmopt", None, Figures(20.0, 20.0, 0.0, 1.0), GOOD.size)
    (point,) = points([GOOD, FAILED, exact])
    assert (point.x, point.y, point.series) == (4.5, 0.1, "llmopt")
