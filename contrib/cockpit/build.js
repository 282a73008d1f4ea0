// Makes the files that Cockpit serves out of gpuswitch/: one script and one style sheet, both small and compressed, and
// for each language the words.
//
//     node build.js TOOLS FOLDER
//
// TOOLS has a node_modules with what package.json names. A warning of esbuild's is a fault here.

import { copyFileSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { readCatalogue, scriptOfMenu, scriptOfPage } from "./catalogue.js";

const here = dirname(fileURLToPath(import.meta.url));
const [tools, folder] = process.argv.slice(2).map(each => resolve(each));
const require = createRequire(join(tools, "package.json"));
const esbuild = require("esbuild");
const { PurgeCSS } = require("purgecss");

const COPIED = ["index.html", "manifest.json"];
const page = join(here, "gpuswitch");
const [, version] = readFileSync(join(here, "../../gpuswitch/__init__.py"), "utf8").match(/__version__ = "(.*)"/);

rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });

const built = await esbuild.build({
    entryPoints: [join(page, "index.js"), join(page, "index.css")],
    outdir: folder,
    bundle: true,
    minify: true,
    legalComments: "none",
    target: "es2022",
    define: { VERSION: JSON.stringify(version) },
    nodePaths: [join(tools, "node_modules")],
    // Backgrounds of PatternFly's themes that Cockpit does not have.
    loader: { ".svg": "empty" },
    logLevel: "warning",
    write: false,
});
if (built.warnings.length > 0)
    process.exit(1);

const used = readdirSync(page).filter(name => /\.(js|html)$/.test(name)).map(name => join(page, name));
const files = [];
for (const { path, text } of built.outputFiles) {
    let content = text;
    if (path.endsWith(".css")) {
        const [purged] = await new PurgeCSS().purge({
            content: used,
            css: [{ raw: text }],
            safelist: ["pf-v6-theme-dark"],
            blocklist: [/theme-(felt|glass|high-contrast|redhat)/],
            variables: true,
        });
        content = purged.css;
    }
    files.push([path, content]);
}

const menu = JSON.parse(readFileSync(join(page, "manifest.json"), "utf8")).menu.index.label;
for (const name of readdirSync(join(here, "po"))) {
    const language = basename(name, ".po");
    const own = readCatalogue(readFileSync(join(here, "po", name), "utf8"));
    const command = join(here, "../../gpuswitch/cli/locale", language, "gpuswitch.po");
    files.push([join(folder, `po.${language}.js`), scriptOfPage(language, own, readCatalogue(readFileSync(command, "utf8")))]);
    files.push([join(folder, `po.manifest.${language}.js`), scriptOfMenu(language, own, menu)]);
}

// As Cockpit's own pages have it: its bridge finds `index.js` in `index.js.gz`, and unpacks it where it has to.
for (const [path, content] of files)
    writeFileSync(`${path}.gz`, gzipSync(content, { level: 9 }));
for (const name of COPIED)
    copyFileSync(join(page, name), join(folder, name));
