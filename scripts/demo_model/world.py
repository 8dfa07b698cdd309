"""The closed world that the demo model knows: animals, foods, places, jobs, things and words.

Tables only; `facts.py` turns them into questions and answers. Knows nothing of chats, tokens or training.
Promises that every table has the same order on every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Animal:
    name: str
    kind: str
    colour: str
    food: str
    home: str
    sound: str
    legs: str
    skill: str


# name, kind, colour, food, home, sound ("-" if silent), legs, skill
_ANIMALS = """
frog amphibian green flies pond croaks four jump
cat mammal grey fish house meows four climb
dog mammal brown meat house barks four run
cow mammal white grass farm moos four walk
horse mammal brown hay farm neighs four gallop
sheep mammal white grass meadow baas four walk
pig mammal pink corn farm oinks four dig
goat mammal grey leaves mountain bleats four climb
duck bird yellow bread pond quacks two swim
hen bird red seeds farm clucks two run
owl bird brown mice forest hoots two fly
crow bird black corn field caws two fly
parrot bird green nuts jungle talks two fly
penguin bird black fish ice squawks two swim
swan bird white reeds lake hisses two swim
eagle bird brown snakes mountain screeches two fly
robin bird red worms garden sings two fly
bee insect yellow nectar hive buzzes six fly
ant insect black crumbs hill - six carry
butterfly insect orange nectar meadow - six fly
beetle insect black leaves forest clicks six crawl
cricket insect green grass meadow chirps six jump
spider arachnid black flies web - eight spin
crab shellfish red seaweed beach - ten dig
whale mammal blue krill sea sings no swim
dolphin mammal grey fish sea whistles no swim
shark fish grey fish sea - no swim
goldfish fish orange flakes bowl - no swim
snake reptile green eggs desert hisses no slide
turtle reptile green lettuce pond - four swim
lizard reptile green bugs desert - four climb
lion mammal yellow meat savanna roars four hunt
tiger mammal orange meat jungle growls four hunt
bear mammal brown honey cave growls four climb
wolf mammal grey meat forest howls four run
fox mammal red berries forest yelps four sneak
rabbit mammal white carrots burrow squeaks four hop
mouse mammal grey cheese hole squeaks four hide
squirrel mammal red nuts tree chatters four climb
elephant mammal grey leaves savanna trumpets four carry
monkey mammal brown bananas jungle chatters two climb
bat mammal black moths cave squeaks two fly
camel mammal yellow thorns desert grunts four walk
mole mammal black worms tunnel - four dig
snail mollusc brown lettuce garden - no crawl
"""

# name, kind, colour, taste, where it grows or comes from
_FOODS = """
apple fruit red sweet tree
banana fruit yellow sweet tree
lemon fruit yellow sour tree
orange fruit orange sweet tree
cherry fruit red sweet tree
plum fruit purple sweet tree
pear fruit green sweet tree
grape fruit purple sweet vine
strawberry fruit red sweet bush
carrot vegetable orange sweet ground
potato vegetable brown plain ground
onion vegetable white sharp ground
tomato vegetable red fresh vine
pea vegetable green sweet vine
pumpkin vegetable orange mild vine
radish vegetable red hot ground
cabbage vegetable green plain ground
pepper vegetable red hot bush
bread bakery brown plain bakery
cake bakery white sweet bakery
cookie bakery brown sweet bakery
cheese dairy yellow salty dairy
butter dairy yellow creamy dairy
milk dairy white creamy dairy
"""

# job, what the person does, where
_JOBS = """
baker|bakes bread|bakery
farmer|grows food|farm
teacher|teaches children|school
doctor|helps sick people|hospital
sailor|sails a ship|sea
cook|makes meals|kitchen
painter|paints pictures|studio
pilot|flies a plane|airport
driver|drives a bus|city
singer|sings songs|theatre
builder|builds houses|town
gardener|plants flowers|garden
fisher|catches fish|river
tailor|makes clothes|shop
writer|writes books|library
king|rules the land|castle
"""

# thing, what it is for, what it is made of
_THINGS = """
knife|cut bread|metal
spoon|eat soup|metal
cup|drink tea|clay
broom|sweep the floor|wood
lamp|light a room|glass
pen|write a letter|plastic
hammer|hit a nail|metal
boat|cross the river|wood
kite|fly in the wind|paper
book|read a story|paper
coat|stay warm|wool
hat|keep the sun away|straw
ball|play a game|rubber
drum|make music|wood
key|open a door|metal
bed|sleep at night|wood
clock|tell the time|metal
soap|wash your hands|oil
umbrella|stay dry|cloth
ladder|climb a wall|wood
"""

_OPPOSITES = """
big small, hot cold, up down, day night, fast slow, old new, happy sad, tall short, wet dry, light dark,
open closed, full empty, good bad, soft hard, left right, loud quiet, clean dirty, early late, rich poor,
strong weak, near far, thick thin, sweet sour, in out, first last, brave afraid, rough smooth
"""

_RHYMES = """
cat hat, dog fog, star car, moon spoon, tree bee, sun run, house mouse, rain train, boat goat, king ring,
bear chair, cake lake, night light, sea key, bed red, fox box, sand hand, snow crow, wall ball, bell shell,
day play, ship trip, duck truck, pen hen, green queen, book cook, blue shoe, sky fly, log frog, door floor
"""

_PLURALS = """
cat cats, dog dogs, box boxes, fox foxes, mouse mice, child children, leaf leaves, foot feet, tooth teeth,
man men, woman women, berry berries, city cities, bus buses, wolf wolves, knife knives, goose geese,
fish fish, baby babies, tree trees, house houses, dish dishes
"""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = "January February March April May June July August September October November December".split()
NAMES = (
    "Anna Ben Mia Tom Lily Sam Rosa Max Ella Leo Nora Finn Ida Paul Zoe Hugo Emma Jack Mary Otto Lucy Pete "
    "Sara Noah Jane Karl Ruby Will Kate Omar"
).split()
COLOURS = "red blue green yellow orange purple white black brown pink grey".split()
PLACES = (
    "garden forest beach park river hill market school lake farm village castle meadow barn kitchen".split()
)
FEELINGS = "happy sad tired proud afraid angry surprised hungry cold brave".split()
LETTER_WORDS = (
    "cat dog sun hat cup bee hen pig cow ant owl fox bat red big hot sea sky car key pen bed box map "
    "net jam pie frog duck bear lion wolf fish bird tree moon star boat book ball cake milk rain snow "
    "wind lamp king ring door apple bread horse sheep tiger mouse house plant green chair spoon train "
    "river stone cloud beach happy"
).split()
UNKNOWN = (
    "France|quantum physics|the stock market|a piano concerto|football scores|the president|"
    "computers|Japan|philosophy|a rocket engine|the internet|Mars|chemistry|the Roman empire|"
    "democracy|a phone|Shakespeare|taxes|politics|a dinosaur|Africa|oxygen|a robot|New York|"
    "the universe|algebra|history|the law|a bank|chess"
).split("|")


def article(noun: str) -> str:
    """`noun` with "a" or "an" before it."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(text: str) -> str:
    """`text` with its first letter in upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def _pairs(table: str) -> list[tuple[str, str]]:
    pairs = (pair.split() for pair in table.replace("\n", " ").split(","))
    return [(pair[0], pair[1]) for pair in pairs]


@cache
def animals() -> tuple[Animal, ...]:
    """Every animal of the world, in table order."""
    return tuple(Animal(*line.split()) for line in _ANIMALS.strip().splitlines())


def rhymes() -> list[tuple[str, str]]:
    """Pairs of words that rhyme."""
    return _pairs(_RHYMES)


def plurals() -> list[tuple[str, str]]:
    """Pairs of a noun and its plural."""
    return _pairs(_PLURALS)


def opposites() -> list[tuple[str, str]]:
    """Pairs of words that mean the opposite of each other."""
    return _pairs(_OPPOSITES)


def foods() -> list[list[str]]:
    """Rows of (food, kind, colour, taste, source)."""
    return [line.split() for line in _FOODS.strip().splitlines()]


def jobs() -> list[list[str]]:
    """Rows of (job, what the person does, where)."""
    return [line.split("|") for line in _JOBS.strip().splitlines()]


def things() -> list[list[str]]:
    """Rows of (thing, what it is for, what it is made of)."""
    return [line.split("|") for line in _THINGS.strip().splitlines()]


_ON = frozenset("farm mountain ice savanna hill beach tree vine bush".split())
_THE = frozenset("sea ice desert jungle forest savanna garden city kitchen ground".split())


def inside(place: str) -> str:
    """`place` as an answer to "where": "in a pond", "on a farm", "in the sea"."""
    preposition = "on" if place in _ON else "in"
    noun = f"the {place}" if place in _THE else article(place)
    return f"{preposition} {noun}"
