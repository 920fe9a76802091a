-- What Word needs beyond Quarto's own: tables that stand alone, and contents that are there before it makes them.

local DEEPEST = 1

local function styled(style, inlines)
  return pandoc.Div(pandoc.Para(inlines), pandoc.Attr("", {}, { ["custom-style"] = style }))
end

-- Quarto puts each table and figure with its caption into the cell of a table: there rows don't flow, headings don't
-- repeat and letters are centred. Here they stand in the text, in the styles that pandoc has for them.
local function unwrapped(outer)
  local rows = outer.bodies[1].body
  if #outer.colspecs ~= 1 or #rows ~= 1 then return nil end
  local content = pandoc.Blocks(rows[1].cells[1].contents)
  local has_table, has_caption = false, false
  content:walk({ Table = function() has_table = true end })
  local function restyled(paragraph)
    local first = paragraph.content[1]
    if first and first.t == "RawInline" and first.text:find("ImageCaption", 1, true) then
      has_caption = true
      paragraph.content:remove(1)
      return styled(has_table and "Table Caption" or "Image Caption", paragraph.content)
    elseif not has_table then
      return styled("Captioned Figure", paragraph.content)
    end
  end
  local stands = content:walk({ Para = restyled, Plain = restyled })
  return has_caption and stands or nil
end

local function escaped(text)
  return (text:gsub("&", "&amp;"):gsub("<", "&lt;"):gsub(">", "&gt;"))
end

local function entry(header)
  return '<w:p><w:pPr><w:pStyle w:val="TOC' .. header.level .. '"/></w:pPr>%s<w:hyperlink w:anchor="'
    .. escaped(header.identifier) .. '"><w:r><w:t>' .. escaped(pandoc.utils.stringify(header.content))
    .. "</w:t></w:r></w:hyperlink></w:p>"
end

-- A field that Word renews, with what it would find but for the pages.
local function contents(blocks)
  local start = '<w:r><w:fldChar w:fldCharType="begin" w:dirty="true"/></w:r><w:r><w:instrText xml:space="preserve">'
    .. ' TOC \\o "1-' .. DEEPEST .. '" \\h \\z \\u </w:instrText></w:r><w:r><w:fldChar w:fldCharType="separate"/></w:r>'
  local entries = {}
  for _, block in ipairs(blocks) do
    if block.t == "Header" and block.level <= DEEPEST then
      entries[#entries + 1] = entry(block):gsub("%%s", #entries == 0 and start or "", 1)
    end
  end
  return table.concat(entries) .. '<w:p><w:r><w:fldChar w:fldCharType="end"/></w:r></w:p>'
end

-- The first page is the results': the contents come before the second chapter.
function Pandoc(doc)
  doc = doc:walk({ Table = unwrapped })
  local chapters = 0
  for place, block in ipairs(doc.blocks) do
    chapters = chapters + ((block.t == "Header" and block.level == 1) and 1 or 0)
    if chapters == 2 then
      doc.blocks:insert(place, pandoc.RawBlock("openxml", '<w:p><w:pPr><w:pStyle w:val="TOCHeading"/></w:pPr><w:r>'
        .. "<w:t>目录</w:t></w:r></w:p>" .. contents(doc.blocks)))
      return doc
    end
  end
  return doc
end
