from llmopt.benchmarks.against_genai import table


def test_a_ratio_compares_within_a_round() -> None:
    # The machine halves its speed in the second round: both medians move, the ratio must not.
    rounds = [[{"decode B1": 200.0}, {"decode B1": 100.0}], [{"decode B1": 100.0}, {"decode B1": 50.0}]]
    assert table(rounds).splitlines()[-1] == "| decode B1 | 150 | 75 | 2.00 | 2.00 - 2.00 |"
