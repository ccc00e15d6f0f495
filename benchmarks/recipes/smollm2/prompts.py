"""What SmolLM2 generates its own training and test text from: beginnings of texts, and questions in its chat template."""

import numpy as np
from transformers import PreTrainedTokenizerBase

#: Table 1 of Valade (2024): the first five begin training text, the other five calibration text.
PAPER_TRAINING = (
    "This is an example script:",
    "My name is",
    "I am a",
    "Welcome to",
    "what is a",
)
PAPER_CALIBRATION = (
    "A cat is",
    "In Python, a list is",
    "In C, we can define a function",
    "The capital of France is",
    "The derivative of x^2 is",
)

BEGINNINGS = (
    "Once upon a time, in a small village by the sea,",
    "The most important thing about learning to cook is",
    "def fibonacci(n):",
    "Dear customer, thank you for your order.",
    "The history of the Roman Empire begins",
    "In this tutorial, we will learn how to",
    "Photosynthesis is the process by which",
    "Last weekend my family and I went",
    "The stock market is a place where",
    "import numpy as np\n",
    "Chapter 1\n\nIt was a cold winter morning when",
    "The human heart consists of",
    "Climate change affects the oceans because",
    "Breaking news: the city council has decided",
    "To solve a quadratic equation, first",
    "Our company was founded in",
    "The best way to grow tomatoes is",
    "A computer program is a set of",
    "In the year 2050, people will",
    "Ingredients:\n- 2 cups of flour\n",
    "The difference between a virus and a bacterium is",
    "She opened the old wooden box and found",
    "SELECT name, price FROM products WHERE",
    "The Second World War ended in",
    "When you feel stressed, it helps to",
    "A good teacher is someone who",
    "The first rule of negotiation is",
    "Electric cars are becoming popular because",
    "Water boils at a temperature of",
    "The detective looked at the footprints and said,",
    "function greet(name) {\n",
    "According to the theory of evolution,",
    "Q: What is the largest planet in the solar system?\nA:",
    "Minutes of the meeting held on Monday:",
    "Music has always been part of",
    "The internet was invented",
    "Here are five tips for better sleep:\n1.",
    "Gravity is the force that",
    "The old man walked slowly along",
    "Abstract: In this paper we propose",
)

QUESTIONS = (
    "What is the boiling point of water?",
    "Write a short poem about the autumn.",
    "Explain to a child why the sky is blue.",
    "Give me three tips for a job interview.",
    "How do I reverse a string in Python?",
    "Summarize the plot of Romeo and Juliet.",
    "What are the benefits of regular exercise?",
    "Translate 'good morning' into French and Spanish.",
    "Write an email asking my boss for a day off.",
    "What is the difference between a list and a tuple in Python?",
    "Tell me a story about a dragon and a princess.",
    "How does a refrigerator work?",
    "Name the planets of the solar system.",
    "What should I visit in Rome?",
    "Explain the law of supply and demand.",
    "Who wrote The Odyssey and what is it about?",
    "Give me a recipe for pancakes.",
    "What is machine learning?",
    "How can I save money every month?",
    "Write a function that checks whether a number is prime.",
    "What causes earthquakes?",
    "Describe the water cycle.",
    "What is the capital of Australia?",
    "How do I start learning the guitar?",
    "Rewrite this sentence politely: Send me the report now.",
    "What happened during the French Revolution?",
    "Compare cats and dogs as pets.",
    "What is the meaning of the word 'resilience'?",
    "Plan a birthday party for ten children.",
    "How many sides does a hexagon have?",
    "Why do leaves change their colour?",
    "Write a product description for a water bottle.",
    "What are prime numbers?",
    "Explain what an API is.",
    "Give me ideas for a healthy breakfast.",
    "What is the tallest mountain in the world?",
    "How do vaccines work?",
    "Write a haiku about the sea.",
    "What is inflation?",
    "How do I remove a coffee stain?",
    "List five European countries and their capitals.",
    "What is the Pythagorean theorem?",
    "How do bees make honey?",
    "Write a dialogue between a teacher and a student.",
    "What is a black hole?",
    "Tell me about the Great Wall of China.",
    "How do I write a good essay?",
    "What are renewable energy sources?",
    "Explain how to change a flat tyre.",
    "What is democracy?",
    "Suggest a name for a coffee shop.",
    "How do airplanes fly?",
    "What are the symptoms of a cold?",
    "Write a SQL query that counts the users by country.",
    "What is the speed of light?",
    "How do I train a puppy?",
    "Who was Marie Curie?",
    "What is the difference between weather and climate?",
    "Write a short speech about friendship.",
    "How do I make a paper airplane?",
)


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question as the model's chat template has it, ready for the answer."""
    said = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


def training(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The paper's five, and three of four others, 80 in all."""
    return [*PAPER_TRAINING, *(text for i, text in enumerate(_others(tokenizer)) if i % 4)]


def held_out(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The paper's five for calibration, and every fourth other, 30 in all."""
    others = _others(tokenizer)
    return [*PAPER_CALIBRATION, *others[::4]]


def _others(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [*BEGINNINGS, *(chat(tokenizer, question) for question in QUESTIONS)]


#: What is asked about in prompts that no head was trained on or chosen by.
TOPICS = (
    "volcanoes, bread, chess, taxes, glaciers, the violin, gardening, black tea, bicycles, the Moon, penguins, sleep, paper, "
    "bridges, honey, the Internet, dreams, soap, elections, coffee, dinosaurs, the heart, cheese, tornadoes, magnets, whales, "
    "pottery, insurance, deserts, lightning, wool, the printing press, tennis, coral reefs, memory, steel, rice, museums, "
    "migraines, satellites, ants, poetry, batteries, mushrooms, swimming, the stock market, owls, rainbows, salt, algebra, "
    "castles, vitamins, the Nile, jazz, concrete, wolves, meditation, compasses, chocolate, lighthouses, allergies, railways, "
    "the brain, origami, solar panels, tides, olive oil, kites, passports, spiders, running shoes, hot-air balloons, cotton, "
    "the Renaissance, fire alarms, elephants, yoga, comets, marriage, wheat, submarines, teeth, fashion, caves, dictionaries, "
    "photography, bananas, the ozone layer, interest rates, snakes, ballet, recycling, clocks, gravity, sushi, hurricanes, "
    "the Vikings, mirrors, fever, trade unions, dolphins, tomatoes, copyright, mountains, knitting, antibiotics, rivers, "
    "radio, the alphabet, horses, opera, plastic, stress, camping, mosquitoes, theatre, nuclear power, pumpkins, "
    "ancient Egypt, cameras, rain, dogs, mortgages, sharks, football, libraries, ice cream, airports, bees, silk, diabetes, "
    "gold, umbrellas, fractions, crows, firefighters, the Silk Road, podcasts, strawberries, eclipses, sailing, glass, "
    "kangaroos, blood pressure, novels, traffic lights, butterflies, wine, encryption, snow, the Olympics, backpacks, "
    "potatoes, hospitals, statistics, bats, candles, earthquake drills, pianos, hiking, zebras, budgets, salmon, rockets, "
    "folk tales, air conditioning, carrots, the Great Depression, drums, fossils, public speaking, garlic, skiing, parrots, "
    "juries, perfume, canals, crossword puzzles, turtles, thunder, apples, weekends, robots, maple syrup, sculpture, "
    "the immune system, ferries, cacti, job references, frogs, electric guitars, seasons, pencils, street markets, lions"
).split(", ")
_ASKED = (
    "Tell me about {}.",
    "Explain {} to a child.",
    "Give me three facts about {}.",
    "Write a short story about {}.",
    "Why do people care about {}?",
    "Write a quiz question about {}, with its answer.",
    "What should a beginner know about {}?",
    "Write a short newspaper article about {}.",
)


def measured(tokenizer: PreTrainedTokenizerBase, count: int = 780) -> list[str]:
    """Prompts that no head was trained on or chosen by, drawn from all topics in all ways of asking."""
    pairs = [(topic, way) for topic in TOPICS for way in _ASKED]
    drawn = np.random.default_rng(3).permutation(len(pairs))[:count].tolist()
    return [chat(tokenizer, pairs[i][1].format(pairs[i][0])) for i in drawn]
