"""Text of many scripts on which tokenizers are compared: what they treat differently, if they do at all.

Sentences written for this purpose. Between them they hold apostrophe suffixes, contractions in either case,
digits of several scripts, composed and decomposed letters, dotted and dotless i, ligatures and other
characters that normalizers change, right-to-left and unspaced scripts, emoji sequences, code, and every kind
of space.
"""

from __future__ import annotations

__all__ = ["SAMPLE"]

SAMPLE: tuple[str, ...] = (
    # Latin letters
    "Hər kəsin adı, səsi və öz süfrəsində yeri var. Bakı'nın küçələrində, Gəncə'dən Şəki'yə gedən yolda, "
    "Naxçıvan'da da belədir. Uşaq 7 yaşında məktəbə gedir; 2024-cü ildə 1 250 000 nəfər oxuyurdu.\n",
    "İstanbul'da ve Iğdır'dan gelen yolda IŞIK söndü, ışık yandı. Ankara'nın %38,5'i; TBMM'ye 550 TL!\n",
    "Everyone has a name, a voice and a place at the table. They're sure it's what we'd want, "
    "I'M SURE IT'S "
    "WHAT WE'LL GET, and y'all've heard it. Don't, can't, won't; the dogs' bowls, o'clock, "
    "rock 'n' roll.\n",
    "Jeder Mensch hat einen Namen; Straße und STRASSE, Äpfel, Öl und Übermut. »So«, sagte er, "
    "„ist's recht.“\n",
    "Chacun a un nom et une voix : l'été, aujourd'hui, qu'il l'œuvre ; « ça va ? » coûte 3,50 €.\n",
    "Cada persona tiene un nombre. ¿Quién lo dijo? ¡El niño de la mañana, a las 10:45!\n",
    "Toda a gente tem um nome; o coração não se vê. Każdy ma imię: zażółć gęślą jaźń. Každý má "
    "jméno, příliš "
    "žluťoučký kůň. Mindenkinek van neve: árvíztűrő tükörfúrógép. Fiecare are un nume: șarpe, țară.\n",
    "Ai cũng có một cái tên và một tiếng nói; đường phố Hà Nội buổi sáng thật đẹp. Kila mtu ana jina lake.\n",
    # Other alphabets
    "У каждого человека есть имя и голос. В 1999-м году, как-то раз, ёжик съел 25 яблок… Правда?\n",
    "Кожна людина має ім'я й голос; з'їзд, об'єкт, Україна — це не «окраїна». Әр адамның өз аты бар.\n",
    "Κάθε άνθρωπος έχει όνομα και φωνή· ΟΔΥΣΣΕΥΣ, Ὀδυσσεύς, τι ωραία μέρα;\n",
    "ყველა ადამიანს აქვს სახელი და ხმა. Ամեն մարդ ունի անուն և ձայն։ Հայերեն՝ այո։\n",
    "לכל אדם יש שם וקול. שָׁלוֹם, מה שלומך? המחיר 12.50 ₪.\n",
    "لكلّ إنسانٍ اسمٌ وصوتٌ. في عام ٢٠٢٤ كان العدد ١٢٣٤٥، أليس كذلك؟\n",
    "هر کس نام و صدایی دارد؛ می‌روم، کتاب‌ها، ۱۴۰۳ سال. ہر شخص کا ایک نام ہے۔\n",
    "हर व्यक्ति का एक नाम और एक आवाज़ है। क्षमा, श्री, १२३४५ रुपये।\n",
    "প্রত্যেক মানুষের একটি নাম আছে। ১২৩ টাকা। ஒவ்வொருவருக்கும் ஒரு பெயர் உண்டு. ప్రతి ఒక్కరికీ "
    "ఒక పేరు ఉంది. "
    "ഓരോ മനുഷ്യനും ഒരു പേരുണ്ട്. ප්‍රත්‍යෙක නමක් ඇත.\n",
    "ทุกคนมีชื่อและมีเสียงของตัวเอง ราคา ๑๒๓ บาท မြန်မာစကား ភាសាខ្មែរ ພາສາລາວ\n",
    "እያንዳንዱ ሰው ስም አለው። ᠮᠣᠩᠭᠣᠯ བོད་སྐད། ᏣᎳᎩ ꯃꯤꯇꯩ\n",
    "每个人都有自己的名字和声音。二〇二四年,价格是¥128,“真的吗?”他问。每個人都有名字。\n",
    "誰にでも名前と声がある。カタカナとﾊﾝｶｸ、ひらがな、「本当?」と彼は言った。第２章…\n",
    "모든 사람에게는 이름과 목소리가 있다. 2024년 3월 1일, 값은 ₩12,000이다. 한글\n",
    # What normalizers change
    "e\u0301te\u0301 = été; Å \u212b A\u030a; ﬁnal ﬂight, ½ ¼ ², ①②③, Ⅳ, ℃, ™, ＦＵＬＬ ｗｉｄｔｈ, ｶﾞ, "
    "Ǆ ǅ ǆ, ſ, İ i\u0307 ı I, ß ẞ\n",
    "NAÏVE Café ÇAĞRI ŞƏKİ ƏLİFBA ÖYRƏN ÜZÜM ĞĞ ZƏFƏR QARABAĞ STRAẞE ΑΒΓ АБВ\n",
    # Numbers, code, punctuation
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1e-9 0x1F 1_000_000 1,234.56 50% $9.99 -7 +3 "
    "±2 x² H₂O 10⁻³\n",
    "def f(x, *args, **kwargs):\n    if x != 0 and not args[-1]:\n\t\treturn {'a': x**2, "
    '"b": [1, 2]}  # done\n',
    '<div class="x">&nbsp;</div> https://example.org/a?b=c&d=%20#e user.name+tag@example.com '
    "C:\\temp\\file.txt\n",
    "snake_case camelCase HTMLParser iPhone15 v2.0-rc1 --flag=value $HOME ~/.bashrc a/b\\c |x| "
    "`code` ^_^ ;-)\n",
    "!!! ??? ... --- === *** ((())) [[]] {{}} \"'\" ''' “” ‘’ «» — – - … • · § ¶ © ® † ‡\n",
    # Spaces and lines
    "one  two   three    four\tfive\t\tsix \n seven\n\neight\n\n\nnine\r\nten\r\n\r\neleven\rtwelve   ",
    "  two spaces first",
    "a\u00a0b\u2003c\u2009d\u200be\u3000f\u2028g\u2029h\u0085i\ufeffj\u200ck\u200dl",
    "x\u0000y\u0007z \u001b[0m",
    # Emoji
    "👍 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇦🇿🇹🇷 ❤️ 1️⃣ 😀😃😄 🤷🏻‍♀️ ☕️ ✓ ★ → ∑ ∀x∈ℝ: x²≥0 🀄 𝔘𝔫𝔦 𐍈 𓀀\n",
)
"""The texts, each to be tokenized by itself."""
