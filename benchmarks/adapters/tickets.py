"""A small text to train an adapter on: letters to a shop that was made up, and tickets made of them.

A ticket has always the same lines in the same order, says what the letter says, and names one of ten next steps. The
base knows nothing of this form, and a small adapter learns it in minutes.
"""

import random

__all__ = ["SYSTEM", "Conversation", "conversations", "held_out", "trained_on"]

Conversation = list[dict[str, str]]
"""Messages with ``role`` and ``content``."""

SYSTEM = "You turn letters to the Hollybrook shop into tickets."

_NAMES = (
    "Ana", "Bram", "Carla", "Dmitri", "Edith", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kaya", "Liam", "Mira",
    "Nils", "Olga", "Pavel", "Rosa", "Sven", "Tara", "Ulla", "Vera", "Wim", "Yara", "Zeno",
)  # fmt: skip

_PRODUCTS = (
    "kettle", "desk lamp", "toaster", "hand mixer", "space heater", "alarm clock", "blender", "vacuum cleaner",
    "coffee grinder", "rice cooker", "electric fan", "hair dryer",
)  # fmt: skip

_PROBLEMS = (
    ("it does not switch on", "dead on arrival", "high", "Send a new one today and collect the old one."),
    ("it smells of smoke", "fire risk", "high", "Ask to unplug it, and call within the hour."),
    ("the box was empty", "lost in transit", "high", "Open a case with the carrier and refund."),
    ("it switches itself off after a minute", "cuts out", "medium", "Send the guide for a reset, then offer repair."),
    ("it is much louder than my old one", "noise", "low", "Offer a return within thirty days."),
    ("the lid is cracked", "broken part", "medium", "Send the part free of charge."),
    ("the colour is not the one I ordered", "wrong item", "low", "Exchange it with a prepaid label."),
    ("it came a week late", "late delivery", "low", "Say sorry and give a voucher of ten percent."),
    ("I was charged twice", "double charge", "high", "Refund the second payment."),
    ("the manual is missing", "missing manual", "low", "Mail the manual as a file."),
)
"""What a letter says; and of its ticket the problem, the urgency and the next step."""

_LETTERS = (
    "Hello, my name is {name}. I ordered a {product} from you, order {order}, and {complaint}. What now?",
    "Order {order}: the {product} arrived, but {complaint}. Please help. {name}",
    "Hi there, about the {product} I bought last month (order {order}). Sadly {complaint}. Regards, {name}",
    "{name} here. I am not happy with my {product}, because {complaint}. The order number is {order}.",
    "Good morning, I have order {order}, a {product}. Yesterday I noticed that {complaint}. Thanks, {name}",
)

_HELD_OUT = 5
"""One in so many pairs of a product and a problem is in no letter that is trained on."""


def trained_on(count: int, *, seed: int = 0) -> list[Conversation]:
    """Letters and tickets for training; the same for the same seed."""
    return conversations([pair for place, pair in enumerate(_pairs()) if place % _HELD_OUT], count, seed=seed)


def held_out(count: int, *, seed: int = 1) -> list[Conversation]:
    """The same about products that have none of these problems in ``trained_on``."""
    return conversations(_pairs()[::_HELD_OUT], count, seed=seed)


def conversations(pairs: list[tuple[int, int]], count: int, *, seed: int) -> list[Conversation]:
    """Conversations of a system prompt, a letter and its ticket.

    Args:
        pairs: Numbers of a product and a problem, of which each conversation draws one.
        count: How many.
        seed: Of everything that is drawn.
    """
    draw = random.Random(seed)
    return [_conversation(draw, *draw.choice(pairs)) for _ in range(count)]


def _pairs() -> list[tuple[int, int]]:
    """Every product with every problem, in an order in which any few neighbours have several of both."""
    pairs = [(product, problem) for product in range(len(_PRODUCTS)) for problem in range(len(_PROBLEMS))]
    random.Random(0).shuffle(pairs)
    return pairs


def _conversation(draw: random.Random, product: int, problem: int) -> Conversation:
    complaint, short, urgency, step = _PROBLEMS[problem]
    said = {"name": draw.choice(_NAMES), "product": _PRODUCTS[product], "order": draw.randrange(10_000, 100_000)}
    letter = draw.choice(_LETTERS).format(complaint=complaint, **said)
    lines = (
        f"TICKET {said['order']}",
        f"Customer: {said['name']}",
        f"Product: {said['product']}",
        f"Problem: {short}",
        f"Urgency: {urgency}",
        f"Next step: {step}",
    )
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": letter},
        {"role": "assistant", "content": "\n".join(lines)},
    ]
