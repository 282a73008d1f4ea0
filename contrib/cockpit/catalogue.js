// Reads catalogues of gettext, and makes of them what Cockpit loads for the language of whoever is logged in.

/** The entries of a catalogue that are translated: `{ files, text, words }`. */
export function readCatalogue(po) {
    return po.split("\n\n").map(entry => {
        const texts = { msgid: "", msgstr: "" };
        let word = "";
        for (const line of entry.split("\n")) {
            const found = line.match(/^(msgid |msgstr |)(".*")$/);
            if (found) {
                word = found[1].trim() || word;
                // What gettext escapes, JSON does alike.
                texts[word] += JSON.parse(found[2]);
            }
        }
        return { files: entry.match(/^#: (.*)$/m)?.[1].split(" ") ?? [], text: texts.msgid, words: texts.msgstr };
    }).filter(({ text, words }) => text && words);
}

const PLURALS = { de: "n => n !== 1", fr: "n => n > 1", zh_CN: "() => 0" };

function locale(language, entries) {
    const texts = entries.map(({ text, words }) => `${JSON.stringify(text)}:[null,${JSON.stringify(words)}]`);
    const head = `"":{"plural-forms":${PLURALS[language]},"language":"${language}","language-direction":"ltr"}`;
    return `cockpit.locale({${[head, ...texts].join(",")}});\n`;
}

/**
 * The script for the page in this language: its own texts, from `page`, and the sentences of the service, from the
 * catalogue of the command. The shell of Cockpit 287 loads it, too, with those of all other pages.
 */
export function scriptOfPage(language, page, command) {
    // The doctor says in words of the command what cannot be done.
    const said = command.filter(({ files, text }) =>
        text.startsWith("cannot ") || files.some(file => !/^(gpuswitch\/(cli|log)\/|argparse$)/.test(file)));
    const keywords = command.filter(({ files }) => files.includes("gpuswitch/cli/translate.py"));
    // What stands between parts of a sentence (gpuswitch/sentence.py, `Sentence.joined`).
    const between = command.filter(({ text }) => text === " or ");
    const words = {
        sentences: Object.fromEntries([...said, ...keywords, ...between].map(({ text, words }) => [text, words])),
        titles: said.filter(({ files }) => files.some(file => file.startsWith("gpuswitch/switch/steps/")))
                .map(({ text }) => text),
        keywords: keywords.map(({ text }) => text),
        operations: keywords.map(({ text }) => text).filter(text => text.includes(" ")),
    };
    return `${locale(language, page)}globalThis.gpuswitchWords=${JSON.stringify(words)};\n`;
}

/** The script for the shell: what its menu says. */
export function scriptOfMenu(language, page, label) {
    return locale(language, page.filter(({ text }) => text === label));
}
