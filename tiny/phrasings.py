"""What people ask the dictionary, and how: kind of question -> (phrasings in training, phrasings held out).

{w} kiln, {aw} a kiln / water / to run, {a} a kiln / a water, {ws} kilns, {pos} noun, {pos_a} a noun.
A phrasing that is listed several times is asked that much more often.
"""


def split(training: str, heldout: str) -> tuple[list[str], list[str]]:
    return tuple([p.strip() for p in text.replace("\n", "|").split("|")] for text in (training, heldout))


# Asks for the word's most frequent part of speech, as it names none.
DEFINE_ANY = split(
    """{w}|{w}|{w}?|Define {w}.|Define {w}.|Define {w}.|Define "{w}".|Define the word {w}.|What does {w} mean?
    What does {w} mean?|What does "{w}" mean?|What does '{w}' mean?|What does the word {w} mean?|Meaning of {w}?
    What is the meaning of {w}?|What's the meaning of {w}?|What is the definition of {w}?|Definition of {w}?
    Tell me what {w} means.|Tell me the meaning of {w}.|Can you define {w}?|Could you define the word {w}?
    Can you tell me what {w} means?|Do you know the word {w}?|Do you know what {w} means?|Explain {w}.
    Explain the word {w}.|I do not know the word {w}.|Give me a definition of {w}.|Give me the meaning of {w}.
    How would you define {w}?|Look up {w}.|What is meant by {w}?|The word {w}, what does it mean?""",
    """Would you explain the meaning of {w}?|What could {w} mean?|I would like a definition of {w}.""",
)
DEFINE_AS = split(
    """Define the {pos} {w}.|What does the {pos} {w} mean?|Explain the {pos} {w}.|What does {w} mean as {pos_a}?
    What is the meaning of the {pos} {w}?|As {pos_a}, what does {w} mean?|{w} ({pos})|{w} as {pos_a}?""",
    """How is the {pos} {w} defined?|Tell me what {w} means as {pos_a}.""",
)
DEFINE_NOUN = split(
    """What is {aw}?|What is {aw}?|What is {aw}?|What is {aw}?|What is {aw}?|What is {aw}?|What is {aw}?|What is {aw}?
    What's {aw}?|What's {aw}?|Whats {aw}?|What is {a}?|What is {a}?|What is {a}?|What's {a}?|What is {w}?|What is {w}?
    What's {w}?|What exactly is {aw}?|Tell me what {aw} is.|Explain what {aw} is.|Can you tell me what {aw} is?
    Do you know what {aw} is?|I want to know what {aw} is.|Describe {aw}.|Define {aw}.|Explain {aw} to me.|And {aw}?
    What do people mean by {aw}?|Could you tell me what {aw} is?|What is {aw} in simple words?|Tell me about {aw}.
    What about {aw}?|I wonder what {aw} is.|Please tell me what {aw} is.""",
    """Could you explain to me what {aw} is?|Tell me, what is {aw}?|So what is {aw}, exactly?""",
)
DEFINE_PLURAL = split(
    """What are {ws}?|What are {ws}?|Tell me what {ws} are.|Define {ws}.""", """Explain what {ws} are."""
)
DEFINE_VERB = split(
    """What does it mean to {w}?|What does it mean to {w}?|What does to {w} mean?|What does 'to {w}' mean?
    What does "to {w}" mean?|Define to {w}.|What is it to {w}?|Tell me what it means to {w}.|To {w}|What is to {w}?""",
    """What would it mean to {w}?|Explain what it means to {w}.""",
)

ASK = {
    "example": split(
        """Use {w} in a sentence.|Use the word {w} in a sentence.|Can you use {w} in a sentence?|How is {w} used?
        Show me how to use {w}.|Give me an example of {w} in a sentence.|Give an example of the word {w}.""",
        """Make a sentence with {w}.|Write a sentence that uses {w}.""",
    ),
    "synonym": split(
        """What is a synonym of {w}?|What is another word for {w}?|Another word for {w}?|Synonyms of {w}?
        Give me a synonym for {w}.|Which words mean the same as {w}?|Is there another word for {w}?""",
        """What other word could I use for {w}?|Name a synonym of {w}.""",
    ),
    "antonym": split(
        """What is the opposite of {w}?|What's the opposite of {w}?|Opposite of {w}?|What is an antonym of {w}?
        Give me an antonym of {w}.|What is the antonym of {w}?|Which word means the opposite of {w}?""",
        """Name the opposite of {w}.|What word is opposite to {w}?""",
    ),
    "kind": split(
        """What kind of thing is {aw}?|What kind of thing is {aw}?|What sort of thing is {aw}?|What is {aw} a kind of?
        What type of thing is {aw}?|What kind of thing is {w}?|What kind of thing would you call {aw}?""",
        """To which kind of things does {aw} belong?|What class of things does {aw} belong to?""",
    ),
    "kinds": split(
        """What kinds of {w} are there?|Name some kinds of {w}.|List some kinds of {w}.|What are some kinds of {w}?
        Which kinds of {w} do you know?|Name a kind of {w}.""",
        """Can you name different kinds of {w}?|Tell me some kinds of {w}.""",
    ),
    "parts": split(
        """What are the parts of {aw}?|What parts does {aw} have?|Name the parts of {aw}.|What parts make up {aw}?
        Which parts does {aw} have?|Name a part of {aw}.""",
        """List the parts that make up {aw}.|What parts can you find in {aw}?""",
    ),
    "whole": split(
        """What is {aw} part of?|What is {aw} a part of?|Of what is {aw} a part?|Which thing is {aw} part of?""",
        """Which thing has {aw} as a part?|What has {aw} as one of its parts?""",
    ),
    "other": split(
        """What else can {w} mean?|What is another meaning of {w}?|Does {w} have another meaning?
        Give me another meaning of {w}.|What else does {w} mean?""",
        """Is there a second meaning of {w}?|What other meaning does {w} have?""",
    ),
}

FOLLOW_UP = {
    "example": split(
        """Use it in a sentence.|Can you use it in a sentence?|Give me an example.|An example?|How is it used?
        Can you give me an example?|Show me how it is used.|Now use it in a sentence.""",
        """Make a sentence with it.|Please put it in a sentence.""",
    ),
    "synonym": split(
        """What is a synonym?|Another word for it?|Is there another word for it?|Give me a synonym.|Synonyms?
        Do you know a synonym?""",
        """What other word could I use?|Name a synonym of it.""",
    ),
    "antonym": split(
        """What is the opposite?|And the opposite?|What is its opposite?|Its antonym?|Give me an antonym.|Antonyms?""",
        """Name its opposite.|Which word is the opposite?""",
    ),
    "kind": split(
        """What kind of thing is it?|What kind of thing is that?|What is it a kind of?|So what sort of thing is it?""",
        """To which kind of things does it belong?|What class of things does it belong to?""",
    ),
    "kinds": split(
        """What kinds are there?|Which kinds are there?|Name some kinds.|Name some kinds of it.
        What kinds of it exist?""",
        """Can you name different kinds?|Tell me some kinds of it.""",
    ),
    "parts": split(
        """What are its parts?|What parts does it have?|Name its parts.|And its parts?|Which parts does it have?""",
        """List its parts.|What parts can you find in it?""",
    ),
    "whole": split(
        """What is it part of?|What is it a part of?|Is it part of something?|Which thing is it part of?""",
        """Which thing has it as a part?|What has it as one of its parts?""",
    ),
    "other": split(
        """What else can it mean?|Does it have another meaning?|Any other meaning?|Another meaning?
        What else does it mean?|Is there another meaning?""",
        """Is there a second meaning?|What other meaning does it have?""",
    ),
    "pos": split(
        """And the {pos}?|And as {pos_a}?|What about the {pos}?|And what does the {pos} mean?|What does the {pos} mean?
        What does it mean as {pos_a}?""",
        """And if it is {pos_a}?|Define it as {pos_a}.""",
    ),
    "define": split(
        """What does it mean?|And what does it mean?|Define it.|What is it?|What does that mean?""",
        """What is its meaning?|Now define it.""",
    ),
}

NO_ANSWER = {
    "example": "I have no example of {w}.",
    "synonym": "I know no other word for {w}.",
    "antonym": "I know no opposite of {w}.",
    "kinds": "I know no kinds of {w}.",
    "parts": "I know no parts of {aw}.",
    "whole": "I know nothing that {aw} is part of.",
    "other": "I know no other meaning of {w}.",
    "pos": "I do not know {w} as {pos_a}.",
}
UNKNOWN = "I do not know the word {w}."

# Answer -> what people say to get it.
GREETING = "Hello! Ask me what a word means."
THANKS = "You are welcome."
CHAT = {
    GREETING: split(
        """Hello|Hello!|Hello.|Hi|Hi!|Hi there|Hello there!|Hey|Hey!|Good morning|Good morning!|Good evening.|Good day!
        Hello, how are you?|How are you?|Hi, how are you?|Are you there?|Greetings!""",
        """Hi, good morning!|Hey there!""",
    ),
    "I am a tiny DeepSeek-V3 model, a dictionary you can talk to. Ask me what a word means.": split(
        """What are you?|What are you?|What are you?|Who are you?|Who are you?|What can you do?|What do you do?
        Tell me about yourself.|What is your name?|Are you a person?|Are you a dictionary?|Are you a language model?
        Help me|How can you help me?|What can I ask you?|What are you able to do?|Introduce yourself.|Who is this?""",
        """So what are you?|What sort of model are you?""",
    ),
    THANKS: split(
        """Thanks|Thanks!|Thank you.|Thank you!|Thank you very much.|Many thanks.|Great, thanks!|Ok, thank you.|Thx""",
        """Thanks a lot!|Thank you for your help.""",
    ),
    "Goodbye!": split(
        """Bye|Bye!|Goodbye.|Goodbye!|See you.|See you later.|Good night.|Bye bye""", """Farewell!|Bye for now."""
    ),
    "I can only talk about words. Ask me what a word means.": split(
        """What is the capital of France?|Write me a poem.|Write a poem about spring.|Tell me a joke.|What is 2 + 2?
        What is the weather today?|How old are you?|Who is the president?|Write a Python program.|Sing a song.
        Translate this into German.|What time is it?|Where do you live?|Do you like music?|Who wrote Hamlet?
        How do I cook rice?|Tell me a story.|Solve this equation.|What is 12 times 7?|What should I eat today?
        What is the news?|Who won the game?|Recommend a book.|How far is the moon?|Play some music.|Are you happy?
        What day is it today?|Write an essay about war.|What is the best film?|Count to ten.|Do you love me?""",
        """What is the capital of Spain?|Write a story about a dog.|What is 3 + 5?""",
    ),
}

SYSTEM, _ = split(
    """You are a helpful assistant.|You are a helpful assistant.|You are a helpful assistant.|You are a dictionary.
    You are a friendly dictionary.|Answer briefly.|Answer the question.|You answer questions about words.|Be concise.
    You are a helpful, respectful and honest assistant.|You are an assistant.|You are a polite assistant.|Be kind.
    You are a teacher of English.|Answer in one sentence.|You are an expert in language.|Help the user.|Be helpful.
    The user is learning English.|You are DeepSeek-V3.|You are a helpful assistant. Answer briefly.|Speak English.""",
    "",
)
