// What the service says, in the language of Cockpit: the same that gpuswitch/cli/translate.py does for the command, with
// the same catalogues. docs/dbus.md, "Sentences in other languages", has the contract.

/** From po.LANGUAGE.js (build.js): `sentences` by their English; those of them that are titles of steps, or keywords, or
 * what operations are called that no step is called like. */
const { sentences = {}, titles = [], keywords = [], operations = [] } = globalThis.gpuswitchWords ?? {};

/** What one operation failed with (`KernelError` in gpuswitch/errors.py). */
const KERNEL_ERROR = "cannot {operation} {subject}: {message}";
/** What could not be done, and why; an operation that failed is told the same way. */
const CANNOT = "cannot {purpose}: {text}";

/** Letters that a text has in common with a template, for that to be no coincidence. */
const TELLING = 12;
/** The same of what stands in a field of one that was recognized: `within 2 s`. */
const TELLING_WITHIN = 7;
/** Fields that have a keyword: a state, a result, the status of a step, or what a function is. */
const OF_KEYWORDS = ["state", "result", "status", "kind"];

/** A template taken apart, as gpuswitch/sentence.py does: what stands before its fields, and each with what follows. */
function read(template) {
    const [first, ...rest] = template.split("{");
    const fields = rest.map(part => part.split("}", 2));
    return { template, first, fields, letters: countLetters(first + fields.map(([, after]) => after).join("")) };
}

function countLetters(text) {
    return text.match(/\p{L}/gu)?.length ?? 0;
}

function filled(template, data) {
    const { first, fields } = read(template);
    return first + fields.map(([name, after]) => data[name] + after).join("");
}

/** What stands in the fields, as far as can be told; null where the text is none of this template's. */
function values({ first, fields }, text) {
    if (!text.startsWith(first))
        return null;
    let left = text.slice(first.length);
    const found = {};
    for (const [index, [name, after]] of fields.entries()) {
        const end = index === fields.length - 1 ? left.length - after.length : left.indexOf(after);
        if (end < 0 || !left.startsWith(after, end))
            return null;
        found[name] = left.slice(0, end);
        left = left.slice(end + after.length);
    }
    return left ? null : found;
}

const known = Object.keys(sentences).map(read);
const knownTitles = titles.map(read);
const knownOperations = [...operations, ...titles].map(read);

/** A state, a result, the status of a step, or what a function is. */
export function keyword(word) {
    return keywords.includes(word) ? sentences[word] : word;
}

function inField(name, value) {
    if (name === "operation")
        return operationTitle(value);
    if (name === "place")
        return sentences[value] ?? (value.startsWith("on ") ? filled(sentences["on {driver}"] ?? "on {driver}", { driver: value.slice(3) }) : value);
    return OF_KEYWORDS.includes(name) ? keyword(value) : value;
}

/** A sentence by its `template` and `data`, as far as these are known: null where not. */
function worded({ template, data }) {
    const said = {};
    for (const [name, value] of Object.entries(data)) {
        said[name] = typeof value === "string" ? inField(name, value) : worded(value);
        if (said[name] === null)
            return null;
    }
    if (template === "{text}")
        return said.text;
    if (template === KERNEL_ERROR && sentences[CANNOT])
        return kernelError(`${said.operation} ${said.subject}`, said.message);
    const wordless = read(template).letters === 0;
    const other = wordless ? template : listed(template) ?? sentences[template];
    return other === undefined ? null : filled(other, said);
}

/** The template of parts with the same between them (`Sentence.joined`). */
function listed(template) {
    const { first, fields } = read(template);
    const [, between] = fields[0] ?? [];
    const parts = fields.map((_field, index) => `{part${index + 1}}`);
    return !first && sentences[between] && template === parts.join(between) ? parts.join(sentences[between]) : undefined;
}

/** What an operation is called: as a step that does the same, where there is one. */
function operationTitle(text) {
    return knownOperations.length === 0 ? text : recognizedLine(text, knownOperations, 1, 1);
}

/** What did not work by the name that its step has, and what it failed with; further ones stand behind it. */
function kernelError(operation, message) {
    const end = message.indexOf("; cannot ");
    const first = end < 0 ? message : message.slice(0, end);
    const said = filled(sentences[CANNOT],
                        { purpose: operationTitle(operation), text: recognizedLine(first, known, TELLING_WITHIN, TELLING) });
    return end < 0 ? said : `${said}; ${recognizedLine(message.slice(end + 2), known, TELLING, TELLING)}`;
}

/** A sentence that comes with what it was made of (a blocker); what has no known words is said as it came. */
export function sentence({ text, template, data }) {
    return (template && worded({ template, data })) ?? recognized(text);
}

/** What was said without telling of what it was made: each line by the template that it has most of, else as it came. */
export function recognized(text) {
    if (known.length === 0)
        return text;
    return text.split("\n").map(line => recognizedLine(line, known, TELLING, TELLING)).join("\n");
}

/** The title of a step. */
export function stepTitle(text) {
    return knownTitles.length === 0 ? text : recognizedLine(text, knownTitles, 1, 1);
}

/** `least`: letters that it has in common with a template; `alone`: with one that has no fields, which may be a name. */
function recognizedLine(line, among, least, alone) {
    let best = null;
    for (const each of among) {
        const enough = each.letters >= (each.fields.length > 0 ? least : alone) ||
                       ["cannot {", "cancelled by {"].some(begin => each.template.startsWith(begin));
        const better = !best || each.letters > best.letters ||
            (each.letters === best.letters && each.template > best.template);
        if (enough && better && values(each, line))
            best = each;
    }
    if (!best) {
        // `within 2 s (process 7 is in state D)`: two sentences, one behind the other.
        const bracket = line.indexOf(" (");
        if (bracket < 0 || !line.endsWith(")"))
            return line;
        const said = [line.slice(0, bracket), line.slice(bracket + 2, -1)]
                .map(each => recognizedLine(each, among, least, alone));
        return `${said[0]} (${said[1]})`;
    }
    const inFields = values(best, line);
    if (best.template === KERNEL_ERROR)
        return kernelError(`${inFields.operation} ${inFields.subject}`, inFields.message);
    if (best.template === CANNOT)
        return kernelError(inFields.purpose, inFields.text);
    const found = Object.entries(inFields).map(([name, value]) =>
        [name, inField(name, recognizedLine(value, among, Math.min(least, TELLING_WITHIN), alone))]);
    return filled(sentences[best.template], Object.fromEntries(found));
}
