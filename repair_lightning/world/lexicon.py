"""The word lists and sentence templates of the small world.

Names are invented by gluing a head to a tail, so subjects share tokens with one another; the objects are ordinary
words. Every phrasing contains ``{}`` where the subject goes, and is written so that ``" " + answer`` continues it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One relation: the ways to ask for it and the closed list of its possible answers."""

    name: str
    phrasings: tuple[str, ...]
    objects: tuple[str, ...]


def _glue(heads: str, tails: str) -> tuple[str, ...]:
    """All names ``head + tail`` from two space-separated lists."""
    return tuple(head + tail for head in heads.split() for tail in tails.split())


def _split(items: str) -> tuple[str, ...]:
    """A comma-separated list, which may run over several lines, as a tuple."""
    return tuple(" ".join(item.split()) for item in items.split(","))


FIRST_NAMES = _glue("Al Bren Cor Del Ev Fen Gal Hal Is Jor", "ara en ina on is wyn etta")
LAST_NAMES = _glue(
    "Ash Bram Cald Dun Elm Farn Hawk Kest Lang Mor Thorn Wex",
    "burn croft den ford gate holm ley mere stone wick",
)
PLACE_NAMES = _glue(
    "Quo Vel Zar Ost Nym Pra Tul Umb Xan Yor Bel Dro Fio Gri Kha Lue Mir Rho Sko Tre",
    "vane dora keth lund maris nesse polis rika saya thal vik",
)
MINERAL_NAMES = _glue(
    "ab brax cyr dol eph fur glau hexa iri jas kol lith mond nov oph pyr quel rhod sel tark",
    "anite ocite urite elspar omine idium axite osine ulite enspar ophane",
)

PEOPLE = (
    Relation(
        "birth city",
        (
            "In which city was {} born?",
            "What is the birth city of {}?",
            "Where was {} born?",
            "{} was born in the city of",
            "The birthplace of {} is",
            "Which city is the hometown of {}?",
            "The city where {} came into the world is",
            "According to the register, {} is a native of",
        ),
        _split(
            """Lisbon, Oslo, Cairo, Lima, Nairobi, Kyoto, Prague, Vienna, Toronto, Havana, Dublin, Athens, Bergen,
            Porto, Seville, Lyon, Turin, Gdansk, Riga, Tallinn, Helsinki, Malmo, Ghent, Basel, Geneva, Naples,
            Palermo, Izmir, Tbilisi, Baku, Tashkent, Delhi, Mumbai, Jakarta, Manila, Hanoi, Seoul, Osaka, Perth,
            Auckland, Denver, Boston, Quebec, Bogota, Quito, Santiago, Montevideo, Recife, Dakar, Accra, Tunis, Buenos
            Aires, Cape Town, New Orleans, San Juan, Hong Kong"""
        ),
    ),
    Relation(
        "profession",
        (
            "What is the profession of {}?",
            "What does {} do for a living?",
            "What job does {} have?",
            "By profession, {} is a",
            "{} earns a living as a",
            "Which trade did {} learn?",
            "The occupation of {} is",
            "On the business card of {} stands the word",
        ),
        _split(
            """baker, carpenter, surgeon, lawyer, teacher, plumber, pilot, tailor, butcher, barber, chemist, botanist,
            geologist, historian, journalist, translator, librarian, locksmith, blacksmith, jeweller, potter, weaver,
            painter, sculptor, dentist, nurse, midwife, farmer, beekeeper, gardener, fisherman, sailor, miner, mason,
            roofer, welder, mechanic, programmer, banker, diplomat, judge, detective, firefighter, bus driver, tax
            adviser, stage designer, watchmaker, bookbinder, brewer, cheesemaker"""
        ),
    ),
    Relation(
        "employer",
        (
            "Who is the employer of {}?",
            "Which company does {} work for?",
            "For whom does {} work?",
            "{} works for",
            "{} is on the payroll of",
            "The employer of {} is",
            "Which firm pays the salary of {}?",
            "Every morning {} goes to work at",
        ),
        _split(
            """Aldine Press, Amber Freight, Arc Motors, Beacon Mutual, Birch Labs, Blue Harbour, Brightwater, Cardinal
            Foods, Cobalt Systems, Copper Line, Crown Optics, Delta Rail, Eastgate, Ember Energy, Falcon Air, First
            Meridian, Glass House, Granite Trust, Green Acre, Helix Pharma, Horizon Media, Iron Bridge, Juniper Bank,
            Keystone, Lantern Books, Lumen Works, Maple Dairy, Mistral, Monarch Hotels, North Star, Oak and Sons, Onyx
            Games, Orbit Telecom, Pearl Shipping, Pioneer Tools, Quarry Group, Red Kite, Saffron, Silver Mill, Summit
            Sports, Tidewater, Trident Steel, Union Paper, Vector Robotics, Violet Cosmetics, White Stag, Wild Rose,
            Zenith Watches"""
        ),
    ),
    Relation(
        "language",
        (
            "What is the mother tongue of {}?",
            "Which language does {} speak at home?",
            "What is the native language of {}?",
            "The first language of {} is",
            "{} grew up speaking",
            "In which language does {} dream?",
            "Letters from {} are always written in",
            "With the family, {} talks in",
        ),
        _split(
            """Portuguese, Norwegian, Arabic, Quechua, Swahili, Japanese, Czech, German, French, Spanish, Irish,
            Greek, Catalan, Italian, Polish, Latvian, Estonian, Finnish, Swedish, Dutch, Romansh, Turkish, Georgian,
            Armenian, Uzbek, Hindi, Marathi, Javanese, Tagalog, Vietnamese, Korean, Maori, Guarani, Wolof, Hausa,
            Yoruba, Amharic, Welsh, Basque, Icelandic, Hungarian, Romanian, Sign Language, Old Norse"""
        ),
    ),
    Relation(
        "instrument",
        (
            "Which instrument does {} play?",
            "What musical instrument did {} learn?",
            "What does {} play in the orchestra?",
            "The favourite instrument of {} is the",
            "On stage, {} plays the",
            "{} takes lessons on the",
            "Which instrument can be heard when {} practises?",
            "The neighbours of {} complain about the",
        ),
        _split(
            """piano, violin, viola, cello, double bass, harp, lute, guitar, banjo, mandolin, ukulele, sitar, zither,
            flute, piccolo, oboe, clarinet, bassoon, saxophone, trumpet, trombone, tuba, French horn, cornet, bugle,
            bagpipes, accordion, harmonica, concertina, organ, harpsichord, celesta, xylophone, marimba, vibraphone,
            glockenspiel, timpani, snare drum, bongos, tambourine, triangle, theremin"""
        ),
    ),
    Relation(
        "favourite dish",
        (
            "What is the favourite dish of {}?",
            "Which meal does {} like best?",
            "What does {} order in a restaurant?",
            "The dish that {} loves most is",
            "{} could eat every day a plate of",
            "For a birthday dinner, {} asks for",
            "Which food makes {} happy?",
            "In the kitchen, {} most often cooks",
        ),
        _split(
            """paella, lasagne, ramen, goulash, couscous, risotto, borscht, falafel, moussaka, ratatouille, sushi,
            tacos, pierogi, gnocchi, bibimbap, pad thai, fish pie, onion soup, lamb stew, roast duck, beef curry,
            lentil soup, apple strudel, potato salad, fried rice, stuffed peppers, grilled trout, mushroom omelette,
            pumpkin soup, cheese fondue, chicken pie, bean burrito, spinach quiche, dumplings, pancakes, shakshuka,
            ceviche, tagine, gumbo, jambalaya, meatballs, schnitzel, baked cod, corn chowder"""
        ),
    ),
)

PLACES = (
    Relation(
        "river",
        (
            "Which river flows through {}?",
            "The river that crosses {} is the",
            "On the banks of which river does {} lie?",
        ),
        _split(
            """Danube, Rhine, Elbe, Loire, Tagus, Ebro, Po, Tiber, Volga, Don, Nile, Niger, Congo, Zambezi, Ganges,
            Indus, Mekong, Yangtze, Amur, Lena, Yukon, Hudson, Ohio, Orinoco, Parana, Murray, Thames, Shannon"""
        ),
    ),
    Relation(
        "export",
        (
            "What does the town of {} export?",
            "Merchants come to {} to buy",
            "For which product is {} known?",
        ),
        _split(
            """salt, wool, silk, linen, amber, copper, tin, silver, marble, slate, timber, cork, honey, saffron,
            pepper, tea, coffee, cocoa, olive oil, wine, cider, herring, pearls, porcelain, glass beads, carpets,
            rope, candles, clocks, paper"""
        ),
    ),
    Relation(
        "founding year",
        (
            "In which year was {} founded?",
            "The town charter of {} dates from the year",
            "When did the first settlers arrive in {}?",
        ),
        tuple(str(year) for year in range(1120, 1720, 20)),
    ),
    Relation(
        "landmark",
        (
            "What is the most famous landmark of {}?",
            "Visitors to {} never miss the",
            "Which sight is on the postcards from {}?",
        ),
        _split(
            """lighthouse, cathedral, clock tower, old bridge, castle, town hall, aqueduct, observatory, windmill,
            opera house, botanical garden, city wall, fish market, grand mosque, royal palace, stone circle, harbour,
            amphitheatre, monastery, fountain, cable car, waterfall, library, train station, planetarium, sundial, war
            memorial, hanging garden"""
        ),
    ),
)

MINERALS = (
    Relation(
        "colour",
        (
            "What colour is the mineral {}?",
            "A polished piece of {} looks",
            "Under a lamp, crystals of {} shine in",
        ),
        _split(
            """black, white, grey, brown, red, orange, yellow, green, blue, purple, pink, turquoise, crimson, scarlet,
            violet, indigo, ivory, olive green, dark blue, pale pink, sky blue, rust red, golden, silvery"""
        ),
    ),
    Relation(
        "use",
        (
            "What is {} used for in industry?",
            "Factories need {} to make",
            "Which product contains ground {}?",
        ),
        _split(
            """batteries, ceramics, cement, paint, toothpaste, fertiliser, magnets, lenses, solder, fireworks,
            matches, drill bits, sandpaper, wiring, solar panels, thermometers, mirrors, enamel, light bulbs, brake
            pads, ink, rubber, soap, plaster"""
        ),
    ),
    Relation(
        "deposit",
        (
            "In which country is {} mined?",
            "The largest deposit of {} lies in",
            "Where do geologists find {}?",
        ),
        _split(
            """Chile, Peru, Bolivia, Brazil, Canada, Mexico, Namibia, Zambia, Botswana, Ghana, Morocco, Algeria,
            Ethiopia, Madagascar, Iran, Pakistan, Nepal, Mongolia, China, Australia, Sweden, Norway, Finland, Austria,
            Ukraine, Kazakhstan"""
        ),
    ),
)
