"""The text that the demo's adapter is trained on: made here, always the same, and apart from what is measured on."""

from llmopt.benchmarks.adapters.tickets import Conversation, held_out, trained_on


def kind(conversation: Conversation) -> tuple[str, str]:
    """The product and the problem of its ticket."""
    lines = dict(line.split(": ") for line in conversation[-1]["content"].splitlines()[1:])
    return lines["Product"], lines["Problem"]


def test_a_ticket_says_what_its_letter_says() -> None:
    for conversation in trained_on(200):
        _, letter, ticket = (message["content"] for message in conversation)
        lines = ticket.splitlines()
        assert [line.partition(":")[0] for line in lines[1:]] == [
            "Customer", "Product", "Problem", "Urgency", "Next step",
        ]  # fmt: skip
        assert lines[0].removeprefix("TICKET ") in letter
        assert all(line.partition(": ")[2] in letter for line in lines[1:3])


def test_no_product_has_a_problem_in_both_texts() -> None:
    trained, measured = (set(map(kind, make(2000))) for make in (trained_on, held_out))
    assert not trained & measured
    assert {problem for _, problem in measured} <= {problem for _, problem in trained}


def test_it_is_the_same_for_the_same_seed() -> None:
    assert trained_on(20) == trained_on(20)
    assert trained_on(20) != trained_on(20, seed=5)
