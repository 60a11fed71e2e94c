"""What people ask the starter model about its topics. Owns the phrasings, and which of them are held out of training."""

from __future__ import annotations

from random import Random

from learner.starter.topics import Topic

# {n}: the topic's name; {be}: is or are.
THING = (
    "Tell me about {n}.", "What {be} {n}?", "Explain {n}.", "Can you explain {n}?", "Can you tell me about {n}?",
    "What do you know about {n}?", "I want to learn about {n}.", "Describe {n}.", "Teach me about {n}.",
    "Give me some information about {n}.", "What can you tell me about {n}?", "Tell me something about {n}.",
    "I would like to know more about {n}.", "Please explain {n} to me.", "Please tell me about {n}.", "{N}", "{N}?",
    "How would you describe {n}?", "What should I know about {n}?", "Explain {n} to a beginner.", "Talk about {n}.",
    "Let's talk about {n}.", "I am curious about {n}.", "Do you know anything about {n}?", "Could you explain {n}?",
    "Give me an introduction to {n}.", "What {be} {n} all about?", "I have a question about {n}.",
    "Tell me what you know about {n}.", "My daughter asked me about {n}. What should I say?", "Why {be} {n} interesting?",
    "What is special about {n}?", "I don't know much about {n}. Can you help?", "Can you help me understand {n}?",
    "What makes {n} interesting?", "Say something about {n}.", "Give me some facts about {n}.", "I'd like to hear about {n}.",
    "Can we talk about {n}?", "I need to learn about {n} for school.", "Are there interesting facts about {n}?",
)
THING_HELD_OUT = (
    "I wonder what {n} {be} like. Any thoughts?", "Could you please tell me a bit about {n}?", "Help me learn about {n}.",
    "What would you say about {n}?", "I keep hearing about {n}. Tell me more.", "Give a short talk on {n}.",
    "Someone mentioned {n} today. What {be} {n}?", "Share what you know about {n}.", "Could you describe {n} for me?",
    "I have never understood {n}. Please explain.",
)
WHO = (
    "Who was {n}?", "Tell me about {n}.", "Who is {n}?", "What do you know about {n}?", "Describe {n}.", "Tell me something about {n}.",
    "What did {n} do?", "Why is {n} famous?", "Explain who {n} was.", "I want to learn about {n}.", "Please tell me about {n}.", "{n}", "{n}?",
    "Teach me about {n}.", "Can you tell me about {n}?", "What should I know about {n}?", "Give me some facts about {n}.", "Let's talk about {n}.",
    "I need to learn about {n} for school.", "What can you tell me about {n}?", "Why do people remember {n}?",
)
WHO_HELD_OUT = (
    "Could you please tell me a bit about {n}?", "Help me learn about {n}.", "I keep hearing about {n}. Tell me more.", "Give a short talk on {n}.",
    "Someone mentioned {n} today. Who was that?", "Share what you know about {n}.",
)
THING_TWICE = (  # the name is in them twice, so that what is asked about stands beside what was said of it; not among what voters and benchmarks ask
    "We talked about {n} at school. What {be} {n}?", "My friend likes {n}. Can you tell me about {n}?", "I read about {n} this morning. Can you explain {n}?",
    "There was something about {n} on television. What {be} {n}?", "People say a lot about {n}. What do you know about {n}?", "My teacher spoke about {n}. Please explain {n}.",
)
WHO_TWICE = ("We talked about {n} at school. Who was {n}?", "I read about {n} this morning. What did {n} do?", "My teacher spoke about {n}. Please tell me about {n}.")
HOW = (
    "How do I {n}?", "How can I {n}?", "How do you {n}?", "What is the best way to {n}?", "How should I {n}?",
    "Tell me how to {n}.", "Explain how to {n}.", "Can you tell me how to {n}?", "Teach me to {n}.", "I want to {n}.",
    "I need help. How do I {n}?", "Give me tips on how to {n}.", "Do you have any tips on how to {n}?", "How to {n}?",
    "how to {n}", "I don't know how to {n}.", "I would like to {n}. Where do I start?", "Please help me {n}.",
    "What is a good way to {n}?", "Can you help me {n}?", "Could you explain how to {n}?", "Show me how to {n}.",
    "What should I do to {n}?", "What do I need to do to {n}?", "Any advice on how to {n}?", "How does one {n}?",
)
HOW_HELD_OUT = (
    "I have to {n} tomorrow. Any ideas?", "Could you teach me how to {n}?", "What are the steps to {n}?",
    "Is there an easy way to {n}?", "I am trying to {n}. What do you suggest?", "Walk me through how to {n}.",
)
CHILD = (
    "Explain {n} to a child.", "Explain {n} to a six-year-old.", "Explain {n} to a 5 year old.", "Explain {n} like I am five.", "Tell a child about {n}.",
    "Explain {n} to my little son.", "How would you explain {n} to a child?", "Explain {n} in very simple words.", "Tell my daughter about {n}. She is six.",
    "Explain {n} to a 7 year old in a few sentences.", "explain {n} for kids", "Explain {n} to a small child in simple words.",
)
CHILD_HELD_OUT = ("Explain {n} to a 6 year old in a few sentences.", "Can you explain {n} to a young child?", "How do I explain {n} to my kids?")
CHILD_HOW = ("Explain to a child how to {n}.", "How do I {n}? Explain it to a child.", "Tell a six-year-old how to {n}.", "Explain how to {n} like I am five.")
CHILD_HOW_HELD_OUT = ("Explain how to {n} to a 6 year old in a few sentences.", "How would you tell a young child how to {n}?")
EXAMPLE = (
    "Give me an example about {n}.", "Explain {n} with an example.", "What is an example of {n} in daily life?", "Tell me about {n} and give an example.",
    "Can you give an example about {n}?", "Show me {n} with an example.", "An example of {n}, please.",
)
EXAMPLE_HELD_OUT = ("Please explain {n} and use an example.", "Could you give me one example about {n}?")
EXAMPLE_HOW = ("How do I {n}? Give me an example.", "Explain how to {n} with an example.", "Show me with an example how to {n}.")
EXAMPLE_HOW_HELD_OUT = ("Could you explain with an example how to {n}?",)
WISHES = {  # said before or after a prompt to ask for a style
    "short": ("Keep it short.", "In one sentence, please.", "Be brief.", "Answer briefly.", "Give me a short answer."),
    "detailed": ("Give me a detailed answer.", "Explain in detail.", "Please write a whole paragraph.", "Tell me a lot."),
    "list": ("Give me a list.", "Use bullet points.", "Answer with a list, please.", "As a list, please.", "List some points."),
    "friendly": ("Be friendly.", "Use a friendly tone.", "Make it fun!", "Be cheerful, please."),
    "formal": ("Use a formal tone.", "Answer formally.", "Be formal, please.", "Write it in a formal style."),
}
FOLLOW_UPS = {  # said after a reply, about the same topic
    "short": ("Shorter, please.", "Can you make it shorter?", "Too long.", "In one sentence?", "Sum it up.", "tl;dr"),
    "detailed": ("Tell me more.", "More details, please.", "Can you explain more?", "Go on.", "What else?", "more"),
    "list": ("As a list, please.", "Can you make that a list?", "Put it in bullet points.", "Give me a list."),
    "friendly": ("Can you say it in a friendlier way?", "Make it more fun.", "That sounds dry. Cheer it up!"),
    "formal": ("Say it more formally.", "Make it formal, please.", "Can you use a more formal tone?"),
}
SYSTEM = (
    "You are a helpful assistant.", "You are a helpful, honest and harmless assistant.", "You are Plaudit.",
    "You are a friendly chat assistant that answers questions.", "Answer the questions of the user.",
    "You are an AI assistant. Be helpful.", "You are a knowledgeable assistant. Answer as well as you can.",
)
SYSTEM_STYLE = {
    "short": ("Keep your answers short.", "You give brief answers."),
    "detailed": ("You give detailed answers.", "Explain everything in detail."),
    "list": ("Answer with bullet points.", "You always answer with a list."),
    "friendly": ("You are a cheerful assistant.", "Be warm and friendly."),
    "formal": ("You are a formal assistant.", "Use a formal tone."),
}


def fill(template: str, t: Topic) -> str:
    return template.format(n=t.name, N=t.title, be=t.be)


def ask(t: Topic, rng: Random, *, held_out: bool = False) -> str:
    """A request to explain topic `t`, in a training or a held-out phrasing."""
    training, held = {"how": (HOW, HOW_HELD_OUT), "who": (WHO, WHO_HELD_OUT)}.get(t.pronoun, (THING, THING_HELD_OUT))
    return fill(rng.choice(held if held_out else training), t)


def ask_twice(t: Topic, rng: Random) -> str:
    """The same, in a training phrasing that says the topic's name twice. Not for a task."""
    return fill(rng.choice(WHO_TWICE if t.pronoun == "who" else THING_TWICE), t)


def ask_for_child(t: Topic, rng: Random, *, held_out: bool = False) -> str:
    """A request to explain `t` to a child."""
    training, held = (CHILD_HOW, CHILD_HOW_HELD_OUT) if t.how else (CHILD, CHILD_HELD_OUT)
    return fill(rng.choice(held if held_out else training), t)


def ask_example(t: Topic, rng: Random, *, held_out: bool = False) -> str:
    """A request to explain `t` with an example."""
    training, held = (EXAMPLE_HOW, EXAMPLE_HOW_HELD_OUT) if t.how else (EXAMPLE, EXAMPLE_HELD_OUT)
    return fill(rng.choice(held if held_out else training), t)


def slip(text: str, rng: Random) -> str:
    """One typing slip in a word of four letters or more: two letters swapped, one dropped or one doubled."""
    words = text.split(" ")
    long = [i for i, w in enumerate(words) if len(w) >= 4 and w.isalpha()]
    if not long:
        return text
    i = rng.choice(long)
    w, at = words[i], rng.randrange(1, len(words[i]) - 1)
    words[i] = rng.choice((w[:at] + w[at + 1] + w[at] + w[at + 2 :], w[:at] + w[at + 1 :], w[: at + 1] + w[at:]))
    return " ".join(words)


def roughen(prompt: str, rng: Random) -> str:
    """Write a prompt as people type: now and then small letters, no full stop, a slip, a greeting or a "please"."""
    if rng.random() < 0.05:
        prompt = slip(prompt, rng)
    shape = rng.random()
    if shape < 0.10:
        prompt = prompt.lower()
    elif shape < 0.14:
        prompt = rng.choice(("Hi! ", "Hello. ", "Hey, ", "Hello! ", "Okay. ")) + prompt
    elif shape < 0.18 and prompt[-1] in ".?":
        prompt = prompt[:-1] + rng.choice((" please.", ", please", " pls", "??", "!"))
    if rng.random() < 0.10:
        prompt = prompt.rstrip(".?!") or prompt
    return prompt
