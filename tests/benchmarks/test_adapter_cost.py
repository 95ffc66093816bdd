"""What adapters cost is measured by one command."""

from llmopt.benchmarks.adapter_cost import main


def test_the_cost_of_adapters_is_a_table(tiny_llama, capsys):
    main(["--model", str(tiny_llama), "--rank", "2", "--sequences", "2", "--past", "8", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if "step" in line or "prompt" in line] == [
        "a step of 2 sequences, none in use",
        "a prompt of 8 tokens, none in use",
        "a step of 2 sequences, 2 adapters",
        "a prompt of 8 tokens, its adapter",
    ]
